"""Reads a spool's records in order while another process writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from livedraft.traces.frames import Frame, find_frame, read_frame
from livedraft.traces.segments import Tail, segment_bases, segment_path


class Hole(NamedTuple):
    """Records ``first`` to ``last`` can no longer be read; ``head`` is what lies in their place."""

    first: int
    last: int
    reason: str
    head: bytes


class SpoolReader:
    """A position in a spool; never writes, needs no lock, and a spool that does not exist yet is an empty one.

        while (record := reader.read()) is not None:
            ...

    An offset older than the oldest record moves on to that one, and ``skipped`` counts what was missed.  An offset
    past the end moves back to it, and ``rewound`` counts that (a loss of power took records that were not synced).
    """

    def __init__(self, folder: Path, offset: int = 0) -> None:
        #: Offset of the next record to read.
        self.next = offset
        #: Records that retention deleted before they were read.
        self.skipped = 0
        self.rewound = 0
        self._folder = folder
        self._tail = Tail(folder)
        self._file: int | None = None
        self._base = -1
        self._at = 0
        #: Size of the file when nothing whole was found from ``_at`` on: not searched again until it grows.
        self._searched = -1

    def seek(self, offset: int) -> None:
        """Go on reading from ``offset``."""
        self._release()
        self.next = offset

    def read(self) -> Frame | Hole | None:
        """The next record, or the hole in its place; None when there is no more yet.  Raises OSError."""
        if self._file is None and not self._enter():
            return None
        while True:
            assert self._file is not None, "_enter and _advance open it"
            whole = read_frame(self._file, self._at)
            if whole is None:
                # In this order: what was written before the next segment appeared is seen by the search.
                following = self._following()
                whole = self._search()
                if whole is None:
                    if following is None:
                        return None
                    if hole := self._advance(following):
                        return hole
                    continue
            if whole.offset > self.next:
                return self._hole(whole.offset)
            self._at = whole.end
            if whole.offset == self.next:
                self.next += 1
                return whole

    def lag(self) -> int:
        """Records written and not yet read."""
        bases = segment_bases(self._folder)
        return max(0, self._tail.end() - max(self.next, bases[0] if bases else 0))

    def close(self) -> None:
        """Release files.  Safe to call twice."""
        self._release()
        self._tail.close()

    def _enter(self) -> bool:
        bases = segment_bases(self._folder)
        if not bases:
            return False
        if self.next < bases[0]:
            self.skipped += bases[0] - self.next
            self.next = bases[0]
        end = self._tail.end()
        if self.next > end:
            self.rewound += self.next - end
            self.next = end
        return self._open(max(base for base in bases if base <= self.next))

    def _following(self) -> int | None:
        return min((base for base in segment_bases(self._folder) if base > self._base), default=None)

    def _advance(self, following: int) -> Hole | None:
        """Leave a segment that is read to its end; what it should have held and does not is a hole."""
        assert self._file is not None
        if self.next < following and os.fstat(self._file).st_size > self._at:
            return self._hole(following)
        if self._open(following):
            self.skipped += max(0, following - self.next)
            self.next = max(self.next, following)
        return None

    def _search(self) -> Frame | None:
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size in (self._at, self._searched):
            return None
        whole = find_frame(self._file, self._at)
        self._searched = size if whole is None else -1
        return whole

    def _hole(self, until: int) -> Hole:
        assert self._file is not None
        where = f"{segment_path(self._folder, self._base).name} at byte {self._at}"
        reason = f"records {self.next} to {until - 1} are damaged: {where}"
        hole = Hole(self.next, until - 1, reason, os.pread(self._file, 64, self._at))
        self.next = until
        return hole

    def _open(self, base: int) -> bool:
        try:
            file = os.open(segment_path(self._folder, base), os.O_RDONLY)
        except FileNotFoundError:  # retention was quicker; the next look finds the oldest segment left
            return False
        self._release()
        self._file, self._base = file, base
        return True

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file, self._base, self._at, self._searched = None, -1, 0, -1
