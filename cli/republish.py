"""Records of one spool copied into another, byte for byte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
from livedraft.traces.chunks import MAGIC, Chunk
from livedraft.traces.frames import Frame
from livedraft.traces.reader import Hole, SpoolReader
from livedraft.traces.spool import SpoolWriter


def republish(reader: SpoolReader, writer: SpoolWriter, last: int) -> Iterator[int]:
    """Append the records from ``reader.next`` to ``last``, a whole trace at a time; yields how many were written.

    Abandoning the iterator after a step leaves nothing half-written, and ``reader.next`` is where to go on.
    Damaged records cannot be copied.  Raises OSError.
    """
    held: list[bytes] = []
    while reader.next <= last and (record := reader.read()) is not None:
        if isinstance(record, Hole):
            continue
        if record.offset > last:  # retention deleted everything up to here
            break
        held.append(record.payload)
        # A trace's chunks go into one append, which keeps them in one segment.
        if _ends_trace(record.payload):
            writer.append(held)
            yield len(held)
            held = []
    if held:
        writer.append(held)
        yield len(held)


def trace_start(folder: Path, offset: int) -> int:
    """Offset of the first record of the trace that record ``offset`` is a chunk of: itself, unless it was cut."""
    with contextlib.closing(SpoolReader(folder, offset)) as reader:
        record = reader.read()
    if not isinstance(record, Frame) or record.offset != offset:
        return offset
    chunk = _chunk(record.payload)
    return offset - chunk.index if chunk else offset


def _ends_trace(message: bytes) -> bool:
    chunk = _chunk(message)
    return chunk is None or chunk.index + 1 >= chunk.count


def _chunk(message: bytes) -> Chunk | None:
    """The chunk that ``message`` is; None for a whole trace, and for what its readers will refuse."""
    if not message.startswith(MAGIC):
        return None
    try:
        return msgspec.msgpack.decode(memoryview(message)[len(MAGIC) :], type=Chunk)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
