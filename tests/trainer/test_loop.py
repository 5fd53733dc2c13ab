"""The process: it learns, publishes, survives a registry that is down, and stops when told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import RegistryUnavailable, StreamUnavailable
from livedraft.contracts.messages import DrafterVersion, Manifest, Trace
from livedraft.contracts.settings import Trainer
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.traces.memory import MemorySource, MemoryStream
from livedraft.trainer.checkpoint import Checkpoints
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.loop import Progress, run
from livedraft.trainer.model import Drafter
from livedraft.trainer.publish import Publisher
from livedraft.trainer.target import Target, fresh_config

TraceMaker = Callable[..., Trace]


class Flaky(MemoryRegistry):
    """Unavailable while ``down``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.down = True
        self.asked = threading.Event()

    def publish(self, folder: Path, manifest: Manifest, metrics: dict[str, float]) -> DrafterVersion:
        self.asked.set()
        if self.down:
            raise RegistryUnavailable("refused")
        return super().publish(folder, manifest, metrics)


class Silent(MemorySource):
    """Of a broker that does not say how much is left, so many times."""

    times = 2

    def lag(self) -> int:
        if self.times:
            self.times -= 1
            raise StreamUnavailable("no answer in time")
        return super().lag()


@pytest.fixture
def options(tmp_path: Path) -> Trainer:
    return Trainer(
        folder=str(tmp_path / "trainer"), batch_traces=2, unroll=3, nice=0, publish_every_s=0.0, checkpoint_every_s=0.0
    )


@pytest.fixture
def learner(target: Target, options: Trainer) -> Learner:
    identity = TargetId(target="tiny", target_revision="r", tokenizer_hash="h")
    return Learner(Drafter.fresh(target, fresh_config(target)), identity, options)


@pytest.fixture
def stream(random_trace: TraceMaker) -> MemoryStream:
    stream = MemoryStream()
    for n in range(6):
        stream.offer(random_trace(n, tokens=8))
    return stream


def test_what_is_learned_is_published_and_checkpointed(
    learner: Learner, stream: MemoryStream, options: Trainer, tmp_path: Path, target: Target
) -> None:
    registry = MemoryRegistry(tmp_path / "registry")
    source = stream.source("trainer")
    run(learner, source, registry, options, threading.Event(), parent="7", until_drained=True)
    assert 0.5 < learner.steps / (6 * options.max_uses // 2) <= 1  # until fewer are left than fill a batch
    assert source.committed() == {"0": 6}
    candidate = registry.resolve("candidate")
    assert candidate is not None
    folder = registry.fetch(candidate.version, tmp_path / "fetched")
    _, manifest = checkpoint.verify(folder, target="tiny", tokenizer_hash="h")
    assert (manifest.steps, manifest.offsets, manifest.tokens_trained) == (learner.steps, {"0": 6}, learner.tokens)
    assert registry.versions()[-1].parent == "7"
    held = Drafter.from_checkpoint(folder, target.embedding).to_arrays()
    assert all((held[name] == array).all() for name, array in learner.candidate().items())
    assert not list((tmp_path / "trainer" / "candidates").iterdir())
    progress = msgspec.json.decode((tmp_path / "trainer" / "progress.json").read_bytes(), type=Progress)
    assert (progress.steps, progress.published) == (learner.steps, candidate.version)


def test_a_registry_that_is_down_stops_nothing(
    learner: Learner, stream: MemoryStream, options: Trainer, tmp_path: Path
) -> None:
    registry = Flaky(tmp_path / "registry")
    run(learner, stream.source("trainer"), registry, options, threading.Event(), until_drained=True)
    assert registry.asked.is_set()
    assert 0.5 < learner.steps / (6 * options.max_uses // 2) <= 1  # until fewer are left than fill a batch
    assert len(list((tmp_path / "trainer" / "candidates").iterdir())) == 1


def test_a_broker_that_does_not_say_how_much_is_left_ends_no_trainer(
    learner: Learner, stream: MemoryStream, options: Trainer, tmp_path: Path
) -> None:
    def lag() -> int | None:
        return msgspec.json.decode((tmp_path / "trainer" / "progress.json").read_bytes(), type=Progress).lag

    source = Silent(stream, "trainer")
    stop = threading.Event()
    stop.set()
    run(learner, source, None, options, stop)
    assert (lag(), source.times) == (None, 1)
    run(learner, source, None, options, threading.Event(), until_drained=True)
    assert (lag(), source.times) == (0, 0)
    assert learner.offsets == {"0": 6}


def test_a_candidate_waits_for_the_registry_to_come_back(learner: Learner, tmp_path: Path) -> None:
    registry = Flaky(tmp_path / "registry")
    publisher = Publisher(registry, tmp_path / "candidates", parent="3", retry_s=0.01)
    publisher.offer(learner, {})
    assert registry.asked.wait(10)
    registry.down = False
    deadline = time.monotonic() + 10
    while registry.resolve("candidate") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    publisher.close()
    found = registry.resolve("candidate")
    assert found is not None
    assert (found.parent, publisher.latest) == ("3", found.version)


def test_stop_ends_it_with_a_checkpoint_to_go_on_from(
    learner: Learner, stream: MemoryStream, options: Trainer, tmp_path: Path, target: Target
) -> None:
    options = msgspec.structs.replace(options, checkpoint_every_s=1e9)
    stop = threading.Event()
    registry = MemoryRegistry(tmp_path / "registry")
    thread = threading.Thread(target=run, args=(learner, stream.source("trainer"), registry, options, stop))
    thread.start()
    while learner.steps < 2:
        time.sleep(0.005)
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    again = Learner(Drafter.fresh(target, fresh_config(target)), learner.target, options)
    assert Checkpoints(tmp_path / "trainer" / "checkpoints").load(again) is not None
    assert (again.steps, again.offsets) == (learner.steps, learner.offsets)
