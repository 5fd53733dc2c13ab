"""The writer of an embedded, durable, append-only log of records for one machine.

One process writes, any number read (``reader``).  What is promised:

- An append that returned under ``fsync="always"`` survives the loss of power; under the other policies it
  survives the death of the process, and the loss of power up to the last sync.
- Offsets grow by one per record.  They come again only for records that a loss of power took.
- A torn tail is cut off by the next writer.  Whole records behind damage are kept, and readers report the hole.
- The messages of one append lie in one segment, so that retention never keeps half of them.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

from livedraft.contracts.errors import TraceError
from livedraft.traces.frames import find_frame, frame, read_frame
from livedraft.traces.segments import segment_bases, segment_path

Fsync = Literal["always", "interval", "never"]

#: Seconds between syncs under ``fsync="interval"``.
SYNC_INTERVAL_S = 1.0


class Disk(Protocol):
    """The three calls by which a spool changes a file; tests hand in failing ones."""

    def write(self, file: int, data: bytes | memoryview, /) -> int:
        """As ``os.write``: may write less than asked."""

    def truncate(self, file: int, length: int, /) -> None:
        """As ``os.ftruncate``."""

    def sync(self, file: int, /) -> None:
        """As ``os.fdatasync``."""


class RealDisk:
    """The operating system's."""

    def write(self, file: int, data: bytes | memoryview, /) -> int:
        """``os.write``."""
        return os.write(file, data)

    def truncate(self, file: int, length: int, /) -> None:
        """``os.ftruncate``."""
        os.ftruncate(file, length)

    def sync(self, file: int, /) -> None:
        """``os.fdatasync`` where there is one."""
        getattr(os, "fdatasync", os.fsync)(file)


class SpoolWriter:
    """Appends to the spool in ``folder``; not thread-safe.

    with SpoolWriter(folder) as spool:
        offset = spool.append([message])

    ``retain_bytes`` bounds all segments together: the oldest go first, the one being written to never.  Segments
    end at ``segment_bytes``, or at a quarter of ``retain_bytes`` where that is less.

    Raises TraceError when another process writes this spool, OSError when the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        segment_bytes: int = 16 << 20,
        retain_bytes: int = 2 << 30,
        fsync: Fsync = "interval",
        disk: Disk | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        #: Offset of the next record.
        self.next_offset = 0
        self._segment_bytes = max(1, min(segment_bytes, retain_bytes // 4))
        self._retain_bytes = retain_bytes
        self._fsync = fsync
        self._disk = disk or RealDisk()
        self._clock = clock
        self._synced_at = clock()
        self._dirty = False
        self._file: int | None = None
        #: First byte after the last whole frame of the segment being written to.
        self._end = 0
        self._torn = False
        folder.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = _lock(folder / "writer.lock")
        try:
            self._sizes = {base: segment_path(folder, base).stat().st_size for base in segment_bases(folder)}
            if self._sizes:
                self._recover(max(self._sizes))
        except BaseException:
            self.close()
            raise

    @property
    def stored_bytes(self) -> int:
        """Size of all segments."""
        return sum(self._sizes.values())

    def append(self, messages: Sequence[bytes]) -> int:
        """Write ``messages`` as consecutive records; returns the offset of the last one.

        When it returns the records are visible to readers and as durable as the policy says.  Raises OSError
        (disk full, for one) with the log sound and the append to be given up: the messages that got through
        whole stay, as readers may have seen them.
        """
        frames = [frame(self.next_offset + n, message) for n, message in enumerate(messages)]
        self._make_room(sum(map(len, frames)))
        self._write(frames)
        self._dirty = True
        if self._fsync == "always":
            self.sync()
        else:
            self.sync_if_due()
        return self.next_offset - 1

    def trim(self, offset: int) -> None:
        """Delete the segments whose records all lie before ``offset``.  Raises OSError."""
        if offset >= self.next_offset and self._end:
            self._begin_segment()  # so that the one being written to can go, too
        bases = sorted(self._sizes)
        for base, following in pairwise(bases):
            if following > offset:
                break
            segment_path(self.folder, base).unlink(missing_ok=True)
            del self._sizes[base]

    def sync(self) -> None:
        """Make everything appended durable now.  Raises OSError."""
        if self._file is not None and self._dirty:
            self._disk.sync(self._file)
            self._dirty = False
        self._synced_at = self._clock()

    def sync_if_due(self) -> None:
        """``sync`` when the interval is over.  Call it in pauses, so that they too end durable.  Raises OSError."""
        if self._fsync == "interval" and self._clock() - self._synced_at >= SYNC_INTERVAL_S:
            self.sync()

    def close(self) -> None:
        """Sync, unless the policy is "never", and let others write.  Safe to call twice; raises OSError."""
        try:
            if self._fsync != "never":
                self.sync()
        finally:
            for file in (self._file, self._lock):
                if file is not None:
                    os.close(file)
            self._file = self._lock = None

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, frames: Sequence[bytes]) -> None:
        assert self._file is not None, "_make_room opens it"
        data = memoryview(b"".join(frames))
        written = 0
        try:
            if self._torn:
                self._cut()
            while written < len(data):
                written += self._disk.write(self._file, data[written:])
        finally:
            for size in map(len, frames):
                if written < size:
                    break
                written -= size
                self._end += size
                self.next_offset += 1
            self._sizes[max(self._sizes)] = self._end
            if written:
                self._torn = True
                self._cut()

    def _cut(self) -> None:
        """Cut off a torn frame; where the disk refuses that too, the next append tries again."""
        assert self._file is not None
        self._disk.truncate(self._file, self._end)
        self._torn = False

    def _make_room(self, size: int) -> None:
        if self._file is None or (self._end and self._end + size > self._segment_bytes):
            self._begin_segment()
        for base in sorted(self._sizes)[:-1]:
            if self.stored_bytes + size <= self._retain_bytes:
                break
            segment_path(self.folder, base).unlink(missing_ok=True)
            del self._sizes[base]

    def _begin_segment(self) -> None:
        if self._fsync != "never":
            self.sync()
        path = segment_path(self.folder, self.next_offset)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if self._file is not None:
            os.close(self._file)
        self._file, self._end, self._dirty, self._torn = file, 0, False, False
        self._sizes[self.next_offset] = 0
        if self._fsync != "never":
            sync_folder(self.folder)

    def _recover(self, base: int) -> None:
        path = segment_path(self.folder, base)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND)
        self.next_offset = base
        while whole := read_frame(self._file, self._end) or find_frame(self._file, self._end):
            self._end, self.next_offset = whole.end, whole.offset + 1
        self._disk.truncate(self._file, self._end)
        self._sizes[base] = self._end


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _lock(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # flock, not lockf: it also keeps out a second writer of the same process.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(file, 32, 0).decode("ascii", "replace").strip()
        os.close(file)
        raise TraceError(f"{path.parent}: process {owner or 'unknown'} already writes this spool") from error
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file
