"""A spool's folder: segment files named by the offset of their first record.

00000000000000000000.seg  00000000000000000412.seg  writer.lock  groups/trainer.json
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from livedraft.traces.frames import find_frame, read_header

_SUFFIX = ".seg"


class Usage(NamedTuple):
    """What a spool holds: records ``oldest`` to ``end - 1`` in ``segments`` files of ``bytes`` bytes together."""

    segments: int
    bytes: int
    oldest: int
    end: int


def segment_path(folder: Path, base: int) -> Path:
    """The segment whose first record has offset ``base``."""
    return folder / f"{base:020d}{_SUFFIX}"


def segment_bases(folder: Path) -> list[int]:
    """First offsets of the segments, ascending; none when there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    stems = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def usage(folder: Path) -> Usage:
    """A spool's contents at this moment, by its headers; a spool that does not exist is empty."""
    bases = segment_bases(folder)
    total = 0
    for base in bases:
        try:
            total += segment_path(folder, base).stat().st_size
        except FileNotFoundError:  # retention is at work
            continue
    with Tail(folder) as tail:
        return Usage(len(bases), total, bases[0] if bases else 0, tail.end())


class Tail:
    """Follows the end of a spool from header to header, reading records only to get past damage."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base = -1
        self._file: int | None = None
        self._at = 0
        self._end = 0
        #: Size of the file when there was nothing whole from ``_at`` on.
        self._searched = -1

    def end(self) -> int:
        """The offset that the next record will have."""
        bases = segment_bases(self._folder)
        if bases and bases[-1] != self._base:
            self.close()
            self._file = os.open(segment_path(self._folder, bases[-1]), os.O_RDONLY)
            self._base, self._at, self._end, self._searched = bases[-1], 0, bases[-1], -1
        if self._file is None:
            return 0
        size = os.fstat(self._file).st_size
        while self._at < size != self._searched:
            found = read_header(self._file, self._at) or find_frame(self._file, self._at)
            if found is None or found.end > size:
                self._searched = size
                break
            self._at, self._end = found.end, found.offset + 1
        return self._end

    def close(self) -> None:
        """Release the file.  Safe to call twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._base = -1

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
