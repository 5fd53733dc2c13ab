"""``livedraft drafts refresh-vocabulary`` on real traffic of the bundled target."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import DrafterVersion, Generation, Sampling, SwapRequest, Trace
from livedraft.contracts.settings import Engine
from livedraft.serving.local.engine import LocalEngine
from livedraft.serving.local.place import find
from livedraft.swap.controller import REFRESHED
from livedraft.traces.admission import held_out
from livedraft.traces.arrays import to_numpy
from livedraft.traces.memory import MemoryStream
from livedraft.traces.urls import open_sink
from livedraft.trainer.evaluate import DraftReplay
from livedraft.trainer.target import read_target
from msgspec.structs import replace

from ..serving.local.client import Client
from .conftest import Site

PROMPTS = ["In the beginning", "And the king said", "def parse(self, text):", "import os", "The sons of", "class Node:"]


def requests(count: int, engine: LocalEngine) -> list[Generation]:
    return [
        Generation(
            request_id=f"r{n}",
            prompt=tuple(engine.encode(PROMPTS[n % len(PROMPTS)])),
            sampling=Sampling(temperature=0.7, seed=n),
            max_tokens=24,
            ignore_eos=True,
        )
        for n in range(count)
    ]


def served(drafter: Path, count: int = 24) -> list[Trace]:
    stream = MemoryStream()
    engine = LocalEngine(Engine(adaptive_depth=False), drafter=drafter, drafter_version="1", sink=stream)
    Client(engine).run(requests(count, engine))
    engine.close()
    return [d.item for d in stream.source("all").poll(limit=count) if isinstance(d.item, Trace)]


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    site = Site(tmp_path_factory.mktemp("traffic"))
    site.configure()
    return served(initial(site))


def initial(site: Site, size: int = 64) -> Path:
    """A drafter that can propose the first tokens of the vocabulary, which traffic seldom says."""
    folder = site.folder / f"first-{size}"
    assert site.run("drafts", "init", "--draft-vocab", str(size), "--out", str(folder)).exit_code == 0
    return folder


def live(site: Site, folder: Path) -> DrafterVersion:
    version = site.registry.publish(folder, checkpoint.verify(folder)[1], {})
    site.registry.point("live", version.version)
    return version


def spool(site: Site, traces: list[Trace]) -> None:
    with contextlib.closing(open_sink(site.settings.traces)) as sink:
        for trace in traces:
            assert sink.offer(trace)


def vocabulary(folder: Path) -> list[int]:
    d2t = checkpoint.load(folder)["d2t"]
    return [int(token) for token in d2t + np.arange(len(d2t))]


def test_the_words_of_recent_traffic_become_a_candidate(site: Site, traffic: list[Trace], tmp_path: Path) -> None:
    first = initial(site)
    old = live(site, first)
    spool(site, traffic)
    dry = site.run("drafts", "refresh-vocabulary", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "nothing written" in dry.stdout
    assert site.registry.resolve(REFRESHED) is None

    result = site.run("drafts", "refresh-vocabulary", "--steps", "0")
    assert result.exit_code == 0, result.output
    found = site.registry.resolve(REFRESHED)
    assert found is not None
    assert (found.parent, found.tags["vocabulary"]) == (old.version, "refreshed")
    assert found.tags["lineage"] != old.tags["lineage"]
    assert site.registry.resolve("candidate") is None  # the trainer's
    (folder,) = (site.folder / "trainer").glob("vocabulary-*")
    assert str(folder) in result.stdout.replace("\n", "")
    config, manifest = checkpoint.verify(folder, like=checkpoint.verify(first)[0])
    assert checkpoint.checksum(manifest.tensors) == found.checksum
    assert manifest.offsets == {"0": len(traffic)}

    counted = [t for t in traffic if not held_out(t.request_id, site.settings.traces.held_out)]
    said = np.bincount(np.concatenate([to_numpy(t.output) for t in counted]), minlength=config.vocab_size)
    kept, before = vocabulary(folder), vocabulary(first)
    assert said[kept].sum() > 3 * said[before].sum()
    assert 2 in kept  # ends an answer
    measured = site.registry.get(found.version).metrics
    assert measured["covered_after"] > measured["covered_before"]
    weights, head = checkpoint.load(folder)["lm_head.weight"], read_target(find("bundled")).head.numpy()
    np.testing.assert_array_equal(weights, head[kept])

    # To the gate it is at least as good, although it has learned nothing.
    scorer = DraftReplay(find("bundled"), 4)
    rounds = [sum(score.rounds for score in scorer.score(place, traffic)) for place in (first, folder)]
    assert rounds[1] < rounds[0]

    # The embedded engine takes it between two steps, and proposes what it could not before.
    stream = MemoryStream()
    engine = LocalEngine(Engine(adaptive_depth=False), drafter=first, drafter_version="1", sink=stream)
    receipt = engine.swap(SwapRequest(path=str(folder), version="2", checksum=found.checksum))
    assert receipt.checksum == found.checksum
    Client(engine).run(requests(6, engine))
    engine.close()
    items = [d.item for d in stream.source("all").poll(limit=6)]
    proposed = {int(token) for item in items if isinstance(item, Trace) for token in to_numpy(item.rounds.tokens)}
    assert proposed <= set(kept)
    assert proposed - set(before)

    again = site.run("drafts", "refresh-vocabulary", found.version, "--out", str(tmp_path / "again"))
    assert again.exit_code == 0, again.output
    assert "most frequent ones already" in again.stdout
    assert not (tmp_path / "again").exists()


def test_the_new_words_are_learned_before_they_are_judged(site: Site, traffic: list[Trace], tmp_path: Path) -> None:
    live(site, initial(site))
    spool(site, traffic)
    folders = {steps: tmp_path / f"after-{steps}" for steps in (0, 20)}
    for steps, folder in folders.items():
        result = site.run("drafts", "refresh-vocabulary", "--steps", str(steps), "--out", str(folder))
        assert result.exit_code == 0, result.output
    about = {steps: checkpoint.verify(folder)[1] for steps, folder in folders.items()}
    assert vocabulary(folders[20]) == vocabulary(folders[0])
    assert checkpoint.lineage(about[20].tensors) == checkpoint.lineage(about[0].tensors)
    assert (about[0].steps, about[20].steps) == (0, 20)
    assert about[20].tokens_trained > 0
    assert about[20].offsets == about[0].offsets == {"0": len(traffic)}
    judges = [t for t in traffic if held_out(t.request_id, site.settings.traces.held_out)]
    assert judges
    scorer = DraftReplay(find("bundled"), 4)
    rounds = {steps: sum(score.rounds for score in scorer.score(folder, judges)) for steps, folder in folders.items()}
    assert rounds[20] < rounds[0]


def test_what_stands_in_the_way_is_told(site: Site, traffic: list[Trace]) -> None:
    assert "live" in site.run("drafts", "refresh-vocabulary").stderr
    whole = initial(site, 4096)
    version = live(site, whole).version
    assert f"version {version} can propose all 4,096 tokens" in site.run("drafts", "refresh-vocabulary").stderr
    live(site, initial(site))
    assert "no traces there" in site.run("drafts", "refresh-vocabulary").stderr
    spool(site, [replace(trace, target_revision="another") for trace in traffic[:12]])
    assert "0 traces of livedraft-tiny to count" in site.run("drafts", "refresh-vocabulary").stderr
    spool(site, traffic)
    result = site.run("drafts", "refresh-vocabulary", "--out", str(whole))
    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert "traces of livedraft-tiny" in site.run("drafts", "refresh-vocabulary", "--records", "3").stderr
    assert site.registry.resolve(REFRESHED) is None
