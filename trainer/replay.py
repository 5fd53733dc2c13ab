"""What is trained on next: new traces first, recent ones again, and now and then one from long memory.

Second and later passes over recent traces bring most of what there is to gain; a reservoir over everything ever
seen, stratified by domain, keeps a new domain from erasing the old.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from livedraft.contracts.messages import Record, Trace
from livedraft.trainer.notice import Notice

#: A trace, or what is known of one that another rank holds.
Kept = Trace | Notice


class ReplayState(Record, frozen=True, kw_only=True):
    """A ``Replay`` without its traces: trace ids in order."""

    #: (trace id, uses) of recent traces, oldest first.
    recent: tuple[tuple[str, int], ...]
    memory: dict[str, tuple[str, ...]]
    #: Traces ever offered to memory, by domain.
    offered: dict[str, int]
    unused: int


@dataclass
class _Recent:
    trace: Kept
    uses: int = 0


class Replay:
    """Recent traces, each used at most ``max_uses`` times, and a reservoir of those that left.

    ``capacity`` bounds all traces; half of it is memory, shared equally by domains.  Rehearsals from memory do
    not count as uses, but happen only along with recent traces.  Random choices are the caller's generator's.
    """

    def __init__(self, *, capacity: int, max_uses: int, fresh_share: float, rehearse_share: float) -> None:
        self._room = math.ceil(capacity / 2)
        self._memory_room = capacity - self._room
        self._max_uses = max_uses
        self._fresh_share = fresh_share
        self._rehearse_share = rehearse_share
        self._recent: deque[_Recent] = deque()
        self._memory: dict[str, list[Kept]] = {}
        self._offered: dict[str, int] = {}
        #: Traces that left without ever being trained on: traffic outran the trainer.
        self.unused = 0
        #: How many of the last sample, its first, had not been drawn before.
        self.new = 0

    def __iter__(self) -> Iterator[Kept]:
        yield from (kept.trace for kept in self._recent)
        for traces in self._memory.values():
            yield from traces

    def add(self, trace: Kept, rng: random.Random) -> None:
        """Take a new trace; the oldest recent one may move to memory."""
        self._recent.append(_Recent(trace))
        if len(self._recent) > self._room:
            leaving = self._recent.popleft()
            self.unused += leaving.uses == 0
            self._remember(leaving.trace, rng)

    def exchange(self, traces: Mapping[str, Kept]) -> None:
        """Hold ``traces``, by id, in place of those of the same ids."""
        for kept in self._recent:
            kept.trace = traces.get(kept.trace.trace_id, kept.trace)
        for held in self._memory.values():
            held[:] = [traces.get(trace.trace_id, trace) for trace in held]

    def discard(self, unfit: Callable[[Kept], bool]) -> None:
        """Let go of every trace that is ``unfit``."""
        self._recent = deque(kept for kept in self._recent if not unfit(kept.trace))
        for held in self._memory.values():
            held[:] = [trace for trace in held if not unfit(trace)]

    def turn_over(self, keep: int, rng: random.Random) -> None:
        """Begin anew with what was never drawn and the latest ``keep`` that were: the rest is history, for memory."""
        used = [kept for kept in self._recent if kept.uses]
        past = used[: max(len(used) - keep, 0)]
        gone = {kept.trace.trace_id for kept in past}
        self._recent = deque(kept for kept in self._recent if kept.trace.trace_id not in gone)
        for kept in past:
            self._remember(kept.trace, rng)

    def can_sample(self, size: int, *, new: bool = False) -> bool:
        """Whether a batch of ``size`` can be drawn; ``new``: of traces never drawn before, but for rehearsals."""
        usable = [kept for kept in self._usable() if not (new and kept.uses)]
        return len(usable) >= size - self._rehearsals(size)

    def sample(self, size: int, rng: random.Random, *, fresh_share: float | None = None) -> list[Kept]:
        """A batch of ``size`` traces, no recent one twice.  Call only while ``can_sample(size)``.

        At most ``fresh_share`` of it (the constructor's by default) is new while used ones are left to fill the rest,
        any of them alike: to draw the least used first would be to learn the latest few over and over.
        """
        share = self._fresh_share if fresh_share is None else fresh_share
        rehearsed = self._rehearse(self._rehearsals(size), rng)
        usable = self._usable()
        new = [kept for kept in usable if kept.uses == 0]
        used = [kept for kept in usable if kept.uses]
        rng.shuffle(used)
        wanted = size - len(rehearsed)
        fresh = max(math.ceil(size * share), wanted - len(used))
        self.new = min(len(new), fresh, wanted)
        chosen = (new[:fresh] + used)[:wanted]
        for kept in chosen:
            kept.uses += 1
        return [kept.trace for kept in chosen] + rehearsed

    def state(self) -> ReplayState:
        """What ``restore`` needs beside the traces."""
        return ReplayState(
            recent=tuple((kept.trace.trace_id, kept.uses) for kept in self._recent),
            memory={domain: tuple(t.trace_id for t in traces) for domain, traces in self._memory.items()},
            offered=dict(self._offered),
            unused=self.unused,
        )

    def restore(self, state: ReplayState, traces: Mapping[str, Kept]) -> None:
        """Become what ``state`` was taken of.  Raises KeyError when a trace is missing."""
        self._recent = deque(_Recent(traces[name], uses) for name, uses in state.recent)
        self._memory = {domain: [traces[name] for name in names] for domain, names in state.memory.items()}
        self._offered = dict(state.offered)
        self.unused = state.unused

    def _usable(self) -> list[_Recent]:
        return [kept for kept in self._recent if kept.uses < self._max_uses]

    def _rehearsals(self, size: int) -> int:
        return min(int(size * self._rehearse_share), sum(map(len, self._memory.values())))

    def _rehearse(self, count: int, rng: random.Random) -> list[Kept]:
        domains = [domain for domain, traces in self._memory.items() if traces]
        return [rng.choice(self._memory[rng.choice(domains)]) for _ in range(count)]

    def _remember(self, trace: Kept, rng: random.Random) -> None:
        """Reservoir sampling (Vitter 1985, algorithm R) within the trace's domain."""
        traces = self._memory.setdefault(trace.domain, [])
        self._offered[trace.domain] = seen = self._offered.get(trace.domain, 0) + 1
        room = self._memory_room // len(self._memory)
        for crowded in self._memory.values():
            while len(crowded) > room:
                crowded.pop(rng.randrange(len(crowded)))
        if len(traces) < room:
            traces.append(trace)
        elif room and (place := rng.randrange(seen)) < room:
            traces[place] = trace
