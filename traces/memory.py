"""A stream inside one process: the port's other adapter, for tests and for runs that keep nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from livedraft.contracts.messages import DeadLetter, Delivery, Offsets, Trace
from livedraft.traces.source import PARTITION


class MemoryStream:
    """A ``TraceSink`` that keeps ``capacity`` traces and drops the rest; ``source`` reads them.  Thread-safe.

    stream = MemoryStream()
    engine = ...(sink=stream)
    trainer = ...(source=stream.source("trainer"))
    """

    def __init__(self, *, capacity: int | None = None) -> None:
        self.offered = 0
        self.dropped = 0
        self._capacity = capacity
        self._closed = False
        self._items: list[Trace | DeadLetter] = []
        self._committed: dict[str, Offsets] = {}
        self._changed = threading.Condition()

    def offer(self, trace: Trace) -> bool:
        """Keep a trace; False when the stream is full or closed."""
        with self._changed:
            self.offered += 1
            if self._closed or len(self._items) == self._capacity:
                self.dropped += 1
                return False
            self._put(trace)
            return True

    def damage(self, reason: str) -> None:
        """Put a dead letter on the stream, as damage on disk would."""
        with self._changed:
            self._put(DeadLetter(offset=len(self._items), reason=reason))

    def close(self, timeout: float = 5.0) -> None:
        """Take no more; what is there can still be read."""
        with self._changed:
            self._closed = True

    def source(self, group: str) -> MemorySource:
        """A consumer that starts at what ``group`` committed last."""
        return MemorySource(self, group)

    def read(self, start: int, limit: int, timeout: float) -> list[Trace | DeadLetter]:
        """Items from ``start`` on, waiting at most ``timeout`` seconds for the first."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while len(self._items) <= start and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._items[start : start + limit]

    def commit(self, group: str, offsets: Offsets) -> None:
        """Remember a group's offsets."""
        with self._changed:
            self._committed[group] = dict(offsets)

    def committed(self, group: str) -> Offsets:
        """A group's offsets."""
        with self._changed:
            return dict(self._committed.get(group, {}))

    def __len__(self) -> int:
        return len(self._items)

    def _put(self, item: Trace | DeadLetter) -> None:
        self._items.append(item)
        self._changed.notify_all()


class MemorySource:
    """``TraceSource`` of a ``MemoryStream``."""

    def __init__(self, stream: MemoryStream, group: str) -> None:
        self._stream = stream
        self._group = group
        self._next = 0
        self.seek(self.committed())

    def seek(self, offsets: Offsets) -> None:
        """As ``TraceSource.seek``."""
        self._next = offsets.get(PARTITION, 0)

    def on_release(self, save: Callable[[], None]) -> None:
        """One consumer has it all."""

    def poll(self, timeout: float = 0.0, limit: int = 256) -> list[Delivery]:
        """As ``TraceSource.poll``."""
        start = self._next
        items = self._stream.read(start, limit, timeout)
        self._next += len(items)
        return [Delivery(partition=PARTITION, offset=start + n, item=item) for n, item in enumerate(items)]

    def commit(self, offsets: Offsets) -> None:
        """As ``TraceSource.commit``; lives as long as the stream."""
        self._stream.commit(self._group, offsets)

    def committed(self) -> Offsets:
        """As ``TraceSource.committed``."""
        return self._stream.committed(self._group)

    def lag(self) -> int:
        """As ``TraceSource.lag``."""
        return max(0, len(self._stream) - self._next)

    def close(self) -> None:
        """Nothing to release."""
