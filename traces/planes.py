"""Lossless packing of float tensors: byte planes, then zstd.

The high bytes of neighbouring floats (sign and exponent) resemble each other, the low ones are noise; apart, the
high plane shrinks and zstd passes over the noise quickly.
"""

from __future__ import annotations

import numpy as np
import zstandard
from livedraft.contracts.errors import CorruptRecord

#: Level 1: higher ones cost several times more for a per cent or two on hidden states.
LEVEL = 1
#: Largest tensor unpacked; the size is announced by the record, and a record may lie.
MAX_BYTES = 1 << 30


def pack(data: bytes, itemsize: int) -> bytes:
    """Byte planes of ``data`` (items of ``itemsize`` bytes), compressed.  Runs mostly without the GIL."""
    planes = np.frombuffer(data, np.uint8).reshape(-1, itemsize).T
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(planes.tobytes())


def unpack(packed: bytes, itemsize: int, size: int) -> bytes:
    """Inverse of ``pack`` for an original of ``size`` bytes.  Raises CorruptRecord."""
    if not 0 <= size <= MAX_BYTES:
        raise CorruptRecord(f"a packed tensor of {size} bytes, expected at most {MAX_BYTES}")
    try:
        if zstandard.frame_content_size(packed) != size:
            raise CorruptRecord(f"a packed tensor does not hold the {size} bytes its shape asks for")
        planes = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise CorruptRecord(f"a packed tensor: {error}") from error
    if len(planes) != size or size % itemsize:
        raise CorruptRecord(f"a packed tensor does not hold the {size} bytes its shape asks for")
    return np.frombuffer(planes, np.uint8).reshape(itemsize, -1).T.tobytes()
