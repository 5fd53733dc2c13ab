"""The gate's evidence: the most recent traces that the drafters in question have not been trained on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from livedraft.contracts.messages import Delivery, EngineStatus, Offsets, Trace
from livedraft.contracts.ports import TraceSource
from livedraft.swap.gate import stratum


class Evidence:
    """Recent traces of the stream, held in memory.

    Two kinds are fair: those held out of training for good (by request id), and those that arrived after the
    candidate's last lesson, which make an honest test of it until the trainer gets to them.  The offsets committed
    are those of the oldest held-out trace kept, so that a new process starts with the same evidence.
    """

    def __init__(self, source: TraceSource, held_out: Callable[[str], bool], keep: int) -> None:
        self._source = source
        self._held_out = held_out
        self._keep = keep
        self._kept: deque[Delivery] = deque(maxlen=keep)
        self._latest: deque[Delivery] = deque(maxlen=keep)
        self._next: Offsets = dict(source.committed())
        source.seek(self._next)

    def refresh(self, stop: threading.Event) -> list[Trace]:
        """Read what is new on the stream and return it."""
        traces: list[Trace] = []
        while not stop.is_set() and (deliveries := self._source.poll(0.0, 64)):
            for delivery in deliveries:
                self._next[delivery.partition] = delivery.offset + 1
                if isinstance(delivery.item, Trace):
                    traces.append(delivery.item)
                    self._latest.append(delivery)
                    if self._held_out(delivery.item.request_id):
                        self._kept.append(delivery)
        if traces:
            oldest = {d.partition: d.offset for d in reversed(self._kept)}
            self._source.commit(self._next | oldest)
        return traces

    def recent(self, status: EngineStatus, trained: Offsets, since: float) -> list[Trace]:
        """The last ``keep`` fair traces of this target that ended after ``since`` (Unix seconds), oldest first.

        ``trained``: the offsets that the candidate has been trained through.
        """
        unseen = [d for d in self._latest if d.partition in trained and d.offset >= trained[d.partition]]
        fair = {d.item.trace_id: d.item for d in [*self._kept, *unseen] if isinstance(d.item, Trace)}
        usable = [t for t in fair.values() if t.finished_at >= since and _same_target(t, status)]
        return sorted(usable, key=lambda t: t.finished_at)[-self._keep :]

    def today(self, status: EngineStatus) -> list[Trace]:
        """The last ``keep`` traces of this target, learned from or not: what traffic is like now."""
        latest = [d.item for d in self._latest if isinstance(d.item, Trace)]
        return [t for t in latest if _same_target(t, status)]


def mix(traces: Iterable[Trace]) -> dict[str, float]:
    """Output tokens by stratum of the traffic."""
    found: dict[str, float] = {}
    for trace in traces:
        name = stratum(trace.domain, trace.sampling.temperature)
        found[name] = found.get(name, 0.0) + trace.output.shape[0]
    return found


def _same_target(trace: Trace, status: EngineStatus) -> bool:
    seen = (trace.target, trace.target_revision, trace.tokenizer_hash)
    return seen == (status.target, status.target_revision, status.tokenizer_hash)
