"""A consumer's view of a spool: records to traces, bad ones to dead letters."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from livedraft.contracts.errors import TraceError
from livedraft.contracts.messages import DeadLetter, Delivery, Offsets
from livedraft.traces.chunks import Assembler
from livedraft.traces.codec import decode
from livedraft.traces.groups import GroupOffsets
from livedraft.traces.reader import Hole, SpoolReader

#: A spool is one partition.
PARTITION = "0"
#: Seconds between two looks at the files: short after a record, longer while nothing comes.
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.002, 0.05
_HEAD_BYTES = 64


class SpoolSource:
    """``TraceSource`` of a spool, starting at what ``group`` committed last, or at the oldest record.

    A trace has the offset of its last chunk.  The writer keeps a trace's chunks together, so an item's offset + 1
    never lies inside another trace.
    """

    def __init__(self, folder: Path, group: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._groups = GroupOffsets(folder, group)
        self._reader = SpoolReader(folder, self._groups.load().get(PARTITION, 0))
        self._assembler = Assembler()
        self._sleep = sleep

    @property
    def skipped(self) -> int:
        """Records that retention deleted before this consumer came to them."""
        return self._reader.skipped

    @property
    def incomplete(self) -> int:
        """Traces given up because not all of their chunks were written."""
        return self._assembler.incomplete

    def seek(self, offsets: Offsets) -> None:
        """Continue from ``offsets``; without one for partition "0", at the oldest record."""
        self._reader.seek(offsets.get(PARTITION, 0))
        self._assembler = Assembler()

    def on_release(self, save: Callable[[], None]) -> None:
        """One consumer of a group has the whole spool."""

    def poll(self, timeout: float = 0.0, limit: int = 256) -> list[Delivery]:
        """Up to ``limit`` items, waiting at most ``timeout`` seconds for the first.

        Raises OSError; bad data comes as dead letters.
        """
        deadline = time.monotonic() + timeout
        wait = _SHORTEST_WAIT_S
        while not (items := self._read(limit)):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._sleep(min(wait, left))
            wait = min(2 * wait, _LONGEST_WAIT_S)
        return items

    def commit(self, offsets: Offsets) -> None:
        """Remember ``offsets`` for the group.  Raises OSError."""
        self._groups.store(offsets)

    def committed(self) -> Offsets:
        """What the group committed last."""
        return self._groups.load()

    def lag(self) -> int:
        """Records (a trace cut into chunks counts as several) written but not yet polled."""
        return self._reader.lag()

    def close(self) -> None:
        """Release files.  Safe to call twice."""
        self._reader.close()

    def _read(self, limit: int) -> list[Delivery]:
        items: list[Delivery] = []
        while len(items) < limit and (record := self._reader.read()) is not None:
            if isinstance(record, Hole):
                letter = DeadLetter(offset=record.first, reason=record.reason, head=record.head)
                items.append(Delivery(partition=PARTITION, offset=record.last, item=letter))
            elif item := self._item(record.offset, record.payload):
                items.append(item)
        return items

    def _item(self, offset: int, message: bytes) -> Delivery | None:
        try:
            record = self._assembler.add(message)
            if record is None:
                return None
            return Delivery(partition=PARTITION, offset=offset, item=decode(record))
        except TraceError as error:
            letter = DeadLetter(offset=offset, reason=str(error), head=message[:_HEAD_BYTES])
            return Delivery(partition=PARTITION, offset=offset, item=letter)
