"""Parcels that a broker has not acknowledged, laid down on disk in order until it has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from livedraft.traces.frames import HEADER_BYTES
from livedraft.traces.groups import GroupOffsets
from livedraft.traces.parcel import Parcel, dump, load
from livedraft.traces.reader import Hole, SpoolReader
from livedraft.traces.source import PARTITION
from livedraft.traces.spool import SpoolWriter

log = logging.getLogger(__name__)

#: Names the offset up to which everything has been acknowledged.
_GROUP = "acknowledged"
#: Least seconds between two durable notes of it: after a crash in between, parcels are sent twice.
_NOTE_S = 0.5


class Spilled(NamedTuple):
    """A parcel of the spill, to be acknowledged under ``offset``."""

    offset: int
    parcel: Parcel


class Spill:
    """A spool read back by its own writer.  Not thread-safe, but ``len``.

        spill.append(parcel)
        while spilled := spill.read():
            send(spilled.parcel)              # then, in the same order: spill.acknowledge(spilled.offset)

    What an earlier process left is there again.  Disk space goes free a segment at a time, once all of it is
    acknowledged.  Raises TraceError when another process has this spill, OSError when the folder cannot be used.
    """

    def __init__(self, folder: Path, *, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        # Twice the limit for the writer, which would delete the oldest: here the newest is refused instead.
        self._writer = SpoolWriter(folder, retain_bytes=2 * max_bytes, segment_bytes=min(16 << 20, max_bytes // 4))
        self._max_bytes = max_bytes
        self._offsets = GroupOffsets(folder, _GROUP)
        self._clock = clock
        #: First parcel not acknowledged.
        self._first = min(self._offsets.load().get(PARTITION, 0), self._writer.next_offset)
        self._noted, self._noted_at = self._first, clock()
        self._reader = SpoolReader(folder, self._first)
        #: Offset of the parcel read last.
        self._handed = self._first - 1

    def __len__(self) -> int:
        return self._writer.next_offset - self._first

    @property
    def stored_bytes(self) -> int:
        """On disk."""
        return self._writer.stored_bytes

    def append(self, parcel: Parcel) -> bool:
        """Lay a parcel down; False when the spill is full.  Raises OSError."""
        record = dump(parcel)
        if self._writer.stored_bytes + len(record) + HEADER_BYTES > self._max_bytes:
            return False
        self._writer.append([record])
        return True

    def read(self) -> Spilled | None:
        """The next parcel; None at the end.  Raises OSError.

        What can no longer be read is logged, passed over, and taken for acknowledged with the next that can.
        """
        while (record := self._reader.read()) is not None:
            if isinstance(record, Hole):
                log.warning("spill: %s", record.reason)
                continue
            try:
                parcel = load(record.payload)
            except msgspec.DecodeError as error:  # another version's, or not ours
                log.warning("spill: record %d dropped: %s", record.offset, error)
                continue
            self._handed = record.offset
            return Spilled(record.offset, parcel)
        if self._handed < self._first:  # all that was handed out is acknowledged: only damage is left
            self._first = self._writer.next_offset
        return None

    def rewind(self) -> None:
        """Read again from the first parcel that is not acknowledged."""
        self._reader.seek(self._first)
        self._handed = self._first - 1

    def acknowledge(self, offset: int) -> None:
        """The broker has the parcel at ``offset``, and all before it."""
        self._first = offset + 1

    def tidy(self, *, now: bool = False) -> None:
        """Note durably what is acknowledged, and delete what nobody needs, when it is time.  Raises OSError."""
        if self._first != self._noted and (now or not len(self) or self._clock() - self._noted_at >= _NOTE_S):
            self._offsets.store({PARTITION: self._first})
            self._noted, self._noted_at = self._first, self._clock()
            self._writer.trim(self._first)
        self._writer.sync_if_due()

    def close(self) -> None:
        """Safe to call twice.  Raises OSError."""
        try:
            self.tidy(now=True)
        finally:
            self._reader.close()
            self._writer.close()
