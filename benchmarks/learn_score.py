"""Accept lengths of a learner's checkpoints, in a process of its own.

    python -m livedraft.benchmarks.learn_score JOB

By ``trainer.evaluate``: each checkpoint drafts for real, on its own outputs, from every root of held-out texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch
from livedraft.benchmarks.learn_files import read
from livedraft.benchmarks.learn_peers import load_checkpoint
from livedraft.cli.wiring import leave_with_parent
from livedraft.contracts.messages import Record, ReplayScore, Trace
from livedraft.serving.local import place
from livedraft.trainer.evaluate import replay
from livedraft.trainer.target import Target, read_target


class ScoreJob(Record, frozen=True, kw_only=True):
    """What the scoring process is told."""

    target: str
    held_out: str
    #: Folder of the run, and the trace set that it learned from.
    run: str
    traces: str
    window: int
    depth: int
    threads: int
    #: Windows that are also scored before they are learned from, by the drafter that would have served them and by
    #: the one of the window ``frozen``: (first, end).
    ahead: tuple[int, int] | None = None
    frozen: int = 0


class Scores(Record, frozen=True, kw_only=True):
    """``scores.json``: expected tokens and rounds, [checkpoint][trace][2]."""

    held_out: list[list[tuple[float, float]]]
    #: Per window of ``ahead``: requests as served by this learner, and by the frozen drafter.
    ahead: list[list[tuple[float, float]]] = []
    frozen: list[list[tuple[float, float]]] = []


def main() -> None:
    """Score, as the job in the file named on the command line says."""
    leave_with_parent()
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ScoreJob)
    torch.set_num_threads(job.threads)
    target = read_target(place.find(job.target))
    held_out = read(Path(job.held_out))
    run = Path(job.run)
    numbers = sorted(int(path.name) for path in run.iterdir() if path.name.isdecimal())
    known = [_score(run / str(number), target, held_out, job.depth) for number in numbers]
    ahead, frozen = [], []
    if job.ahead is not None:
        traces = read(Path(job.traces))
        for window in range(*job.ahead):
            requests = traces[window * job.window : (window + 1) * job.window]
            ahead.append(_score(run / str(window), target, requests, job.depth))
            frozen.append(_score(run / str(job.frozen), target, requests, job.depth))
    scores = Scores(held_out=known, ahead=ahead, frozen=frozen)
    (run / "scores.json").write_bytes(msgspec.json.encode(scores))


def _score(checkpoint: Path, target: Target, traces: list[Trace], depth: int) -> list[tuple[float, float]]:
    scores: list[ReplayScore] = replay(load_checkpoint(checkpoint, target), traces, depth)
    if len(scores) != len(traces):
        raise SystemExit(f"{checkpoint}: {len(scores)} of {len(traces)} traces could be scored")
    return [(score.tokens, score.rounds) for score in scores]


if __name__ == "__main__":
    main()
