"""A learner's process and the scoring of what it wrote, on a target made on the spot."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from livedraft.benchmarks.learn_learners import PEERS
from livedraft.benchmarks.learn_run import Job, Mark
from livedraft.benchmarks.learn_score import ScoreJob, Scores
from livedraft.benchmarks.learn_traces import Sizes, TraceSets, record
from livedraft.contracts.messages import Record

from tests.serving.local.models import make_target

WINDOW = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TraceSets]:
    folder = tmp_path_factory.mktemp("learn")
    target = str(make_target(folder / "target", "llama", vocab_size=4096))
    return target, record(Sizes(held_out=2, weak=16, day0=8, mixed=0, phases=(1, 1, 0)), 0, target, folder / "out")


def run(module: str, job: Record, place: Path) -> None:
    place.write_bytes(msgspec.json.encode(job))
    subprocess.run([sys.executable, "-m", f"livedraft.benchmarks.{module}", str(place)], check=True)


def learn(sets: tuple[str, TraceSets], out: Path, seconds_per_ktoken: float, **settings: Any) -> list[Mark]:
    target, recorded = sets
    job = Job(
        target=target,
        traces=str(recorded.path("day0")),
        start=str(recorded.folder / "fresh"),
        settings={"batch_traces": 2, **settings},
        window=WINDOW,
        seconds_per_ktoken=seconds_per_ktoken,
        seed=0,
        threads=1,
        out=str(out),
    )
    run("learn_run", job, out.parent / "job.json")
    return [msgspec.json.decode(line, type=Mark) for line in (out / "marks.jsonl").read_bytes().splitlines()]


def test_a_job_tells_its_defaults_to_a_peer_that_does_not_know_them() -> None:
    job = Job(target="", traces="", start="", window=1, seconds_per_ktoken=1.0, seed=0, threads=1, out="")
    told = msgspec.json.decode(msgspec.json.encode(job))
    peers = [(ROOT / "benchmarks" / "peers" / f"run_{peer}.py").read_text() for peer in PEERS]
    asked = {name for source in peers for name in re.findall(r'job\["(\w+)"\]', source)}
    assert "windows" in asked
    assert asked - {"verifier"} <= told.keys()


def test_each_window_leaves_a_mark_and_a_checkpoint_and_all_are_scored(
    sets: tuple[str, TraceSets], tmp_path: Path
) -> None:
    target, recorded = sets
    out = tmp_path / "run"
    marks = learn(sets, out, 1000.0, max_uses=1, rehearse_share=0.0, fresh_share=1.0)
    tokens = [trace.output.shape[0] for trace in recorded.read("day0")]
    assert [mark.requests for mark in marks] == [0, 3, 6, 8]
    assert [mark.tokens for mark in marks] == [sum(tokens[:n]) for n in (0, 3, 6, 8)]
    # Two traces make a step, and none is used twice.
    assert [mark.steps for mark in marks] == [0, 1, 3, 4]
    assert marks[-1].trained <= sum(tokens)
    assert marks[-1].cpu_s > 0
    job = ScoreJob(
        target=target,
        held_out=str(recorded.path("held-out")),
        run=str(out),
        traces=str(recorded.path("day0")),
        window=WINDOW,
        depth=2,
        threads=1,
        ahead=(1, 3),
        frozen=1,
    )
    run("learn_score", job, tmp_path / "score.json")
    scores = msgspec.json.decode((out / "scores.json").read_bytes(), type=Scores)
    assert [len(checkpoint) for checkpoint in scores.held_out] == [4] * 4
    assert [len(window) for window in scores.ahead] == [len(window) for window in scores.frozen] == [3, 2]
    assert scores.ahead[0] == scores.frozen[0], "the first window after the frozen drafter was served by it"
    assert scores.ahead[1] != scores.frozen[1]


def test_without_processor_time_nothing_is_learned(sets: tuple[str, TraceSets], tmp_path: Path) -> None:
    marks = learn(sets, tmp_path / "run", 0.0)
    assert marks[-1].steps == 0
    assert marks[-1].requests == 8
