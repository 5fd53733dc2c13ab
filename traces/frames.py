"""Frames: how records lie in a segment file, so that every byte of damage is noticed and stepped over.

    magic "\\xf5LDF" | u4 length | u8 offset | u4 crc32(payload) | u4 crc32(the 20 bytes before) | payload

Little-endian.  The header has a checksum of its own so that a length is never believed by mistake, and a magic so
that the next whole frame can be found after damage.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple
from zlib import crc32

MAGIC = b"\xf5LDF"
_FIELDS = struct.Struct("<4sIQI")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECK.size
#: Bytes searched at a time for the next whole frame.
_WINDOW = 1 << 20


class Header(NamedTuple):
    """Of a frame that starts at byte ``start``; its payload ends at byte ``end``."""

    start: int
    offset: int
    checksum: int
    end: int


class Frame(NamedTuple):
    """A whole frame, proven by its checksums."""

    start: int
    offset: int
    payload: bytes
    end: int


def frame(offset: int, payload: bytes) -> bytes:
    """The bytes of a frame."""
    fields = _FIELDS.pack(MAGIC, len(payload), offset, crc32(payload))
    return b"".join((fields, _CHECK.pack(crc32(fields)), payload))


def read_header(file: int, at: int) -> Header | None:
    """The header at byte ``at`` of an open file, or None where there is none (yet)."""
    head = os.pread(file, HEADER_BYTES, at)
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        return None
    _, length, offset, checksum = _FIELDS.unpack_from(head)
    if _CHECK.unpack_from(head, _FIELDS.size) != (crc32(head[: _FIELDS.size]),):
        return None
    return Header(at, offset, checksum, at + HEADER_BYTES + length)


def read_frame(file: int, at: int) -> Frame | None:
    """The whole frame at byte ``at`` of an open file, or None where there is none (yet)."""
    header = read_header(file, at)
    if header is None:
        return None
    length = header.end - at - HEADER_BYTES
    payload = os.pread(file, length, at + HEADER_BYTES)
    if len(payload) < length or crc32(payload) != header.checksum:
        return None
    return Frame(at, header.offset, payload, header.end)


def find_frame(file: int, at: int) -> Frame | None:
    """The first whole frame at or after byte ``at``, found by its magic.

    Right also while the file grows: frames are written in order, so once one is whole all before it are, and a
    second look finds those that were not yet when the first look passed them.
    """
    return _scan(file, at) and _scan(file, at)


def _scan(file: int, at: int) -> Frame | None:
    while window := os.pread(file, _WINDOW, at):
        found = window.find(MAGIC)
        while found >= 0:
            if whole := read_frame(file, at + found):
                return whole
            found = window.find(MAGIC, found + 1)
        if len(window) < len(MAGIC):
            return None
        # A magic may lie across two windows.
        at += len(window) - (len(MAGIC) - 1)
    return None
