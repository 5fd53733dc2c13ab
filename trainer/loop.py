"""The learning process: read, learn, publish, checkpoint, until told to stop.

Ranks take every turn together: what one of them alone knows is agreed on before it decides anything.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import StreamUnavailable
from livedraft.contracts.messages import Offsets, Record
from livedraft.contracts.ports import Registry, TraceSource
from livedraft.contracts.settings import Trainer as Settings
from livedraft.trainer.checkpoint import Checkpoints
from livedraft.trainer.learner import Learner, Step
from livedraft.trainer.pace import Candidates
from livedraft.trainer.publish import Onlooker, Publisher

_log = logging.getLogger(__name__)


class Progress(Record, frozen=True, kw_only=True):
    """``progress.json``: what the trainer is doing, for ``livedraft status``."""

    steps: int
    tokens: int
    #: Of the last step.
    loss: float | None
    accept_length: float | None
    #: Supervised positions per second of this start, waiting included.
    tokens_per_s: float
    offsets: Offsets
    #: Deliveries by what became of them.
    counts: dict[str, int]
    #: None while the broker has not told.
    lag: int | None
    #: Version published last.
    published: str | None
    at: float
    #: "steady", "recovering" or "resting", and why; times that acceptance has fallen for good.
    mode: str = "steady"
    reason: str = ""
    drifts: int = 0
    #: Running mean of the target's probability on tokens that the drafter cannot propose.
    excluded: float = 0.0


def run(
    learner: Learner,
    source: TraceSource,
    registry: Registry | None,
    settings: Settings,
    stop: threading.Event,
    *,
    parent: str | None = None,
    until_drained: bool = False,
) -> None:
    """Learn from ``source`` until ``stop`` is set, on any rank; then checkpoint and return.

    A rank without a ``registry`` does not publish.  ``parent`` is the version there that ``learner`` starts from.
    ``until_drained`` also returns once the stream has nothing more and all of it is learned.  So does a live version
    with another draft vocabulary: whoever called goes on with that one.  Lowers this process's priority and sets its
    threads.
    """
    _lower_priority(settings)
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = learner.ranks
    checkpoints = Checkpoints(folder / "checkpoints", ranks=ranks)
    checkpoints.load(learner)

    def save() -> None:
        checkpoints.save(learner)
        source.commit(learner.offsets)

    source.on_release(save)
    source.seek(learner.offsets)
    lineage = checkpoint.lineage(checkpoint.hash_tensors({"d2t": learner.drafter.d2t.numpy()}))
    publisher = Publisher(registry, folder / "candidates", parent=parent, lineage=lineage) if registry else Onlooker()
    report = _Report(folder / "progress.json", learner, source, publisher)
    candidates = Candidates(
        gain=settings.publish_gain,
        least_s=min(settings.publish_least_s, settings.publish_every_s),
        most_s=settings.publish_every_s,
        published_at=time.monotonic(),
    )
    checkpoint_due = _Every(settings.checkpoint_every_s)
    published_at = 0  # what an earlier start learned is offered again: a registry knows weights it has
    while not ranks.any(stop.is_set() or publisher.outlived):
        heard = _hear(learner, source)
        if learner.can_learn:
            report.last = learner.step()
            candidates = candidates.learned(learner.pace.level)
        elif until_drained and not heard and not ranks.any(_lag(source) != 0):
            break
        if learner.steps > published_at:
            due, why = ranks.lead(partial(candidates.due, learner.pace.level, time.monotonic()))
            if due:
                _log.info("candidate after %d steps: %s", learner.steps, why)
                publisher.offer(learner, report.metrics)
                published_at, candidates = learner.steps, candidates.published(time.monotonic())
        if ranks.lead(checkpoint_due):
            save()
        report()
    save()
    if learner.steps > published_at and not ranks.lead(lambda: publisher.outlived):
        publisher.offer(learner, report.metrics)
    publisher.close()
    report(now=True)


def _hear(learner: Learner, source: TraceSource) -> bool:
    """Admit what has arrived, waiting for it only when there is nothing to learn."""
    if not learner.appetite:
        return True
    return bool(learner.hear(source.poll(timeout=0.0 if learner.can_learn else 0.5, limit=learner.appetite)))


def _lag(source: TraceSource) -> int | None:
    """None while a broker does not say: only to look at it, a trainer does not end."""
    try:
        return source.lag()
    except StreamUnavailable:
        return None


class _Every:
    """True at most once per ``seconds``."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._last = clock()

    def __call__(self) -> bool:
        due = self._clock() - self._last >= self._seconds
        if due:
            self._last = self._clock()
        return due


class _Report:
    def __init__(self, path: Path, learner: Learner, source: TraceSource, publisher: Publisher | Onlooker) -> None:
        self._path, self._learner, self._source, self._publisher = path, learner, source, publisher
        self._due = _Every(1.0)
        self._start, self._tokens = time.monotonic(), learner.tokens
        self.last: Step | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What goes with a candidate into the registry."""
        found = {"steps": float(self._learner.steps), "tokens_trained": float(self._learner.tokens)}
        if self.last:
            found |= {"loss": self.last.loss, "train_accept_length": self.last.accept_length}
        return found

    def __call__(self, *, now: bool = False) -> None:
        learner, last = self._learner, self.last
        ranks = learner.ranks
        if not (now or ranks.lead(self._due)):
            return
        lags = ranks.gather(_lag(self._source))
        if ranks.rank:
            return
        progress = Progress(
            steps=learner.steps,
            tokens=learner.tokens,
            loss=last.loss if last else None,
            accept_length=last.accept_length if last else None,
            tokens_per_s=(learner.tokens - self._tokens) / max(time.monotonic() - self._start, 1e-9),
            offsets=learner.offsets,
            counts=learner.counts,
            lag=None if None in lags else sum(filter(None, lags)),
            published=self._publisher.latest,
            at=time.time(),
            mode=learner.pace.mode,
            reason=learner.pace.reason,
            drifts=learner.pace.drifts,
            excluded=learner.excluded,
        )
        half = self._path.with_suffix(".half")
        half.write_bytes(msgspec.json.encode(progress))
        half.replace(self._path)


def _lower_priority(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    # Only root may raise a priority again: a process that is nicer already stays so.
    os.nice(max(settings.nice - os.nice(0), 0))
