"""``Array`` (raw little-endian bytes) to numpy and back; bfloat16 travels as its 16 bits, e4m3 as its 8."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from livedraft.contracts.errors import CorruptRecord
from livedraft.contracts.messages import Array, DType, Features, Trace
from numpy.typing import ArrayLike, NDArray

#: numpy has neither bfloat16 nor e4m3: their bits are held as uint16 and uint8.
NUMPY: dict[DType, np.dtype[Any]] = {
    "f4": np.dtype("<f4"),
    "f2": np.dtype("<f2"),
    "bf2": np.dtype("<u2"),
    "e4m3": np.dtype("u1"),
    "i8": np.dtype("<i8"),
    "i4": np.dtype("<i4"),
    "i2": np.dtype("<i2"),
    "u1": np.dtype("u1"),
}


def from_numpy(values: ArrayLike, dtype: DType) -> Array:
    """An ``Array`` of ``dtype`` from anything numpy reads; any shape.

    ``bf2`` takes uint16 as bits and rounds floats, ``e4m3`` takes bits only.  Raises TypeError where the conversion
    would change the kind of the values (floats to integers) and OverflowError where an integer does not fit.
    """
    source = np.asarray(values)
    if source.dtype == NUMPY[dtype]:
        pass
    elif source.size == 0:
        source = source.astype(NUMPY[dtype])
    elif dtype == "bf2" and source.dtype != np.uint16:
        source = float32_to_bf16(source.astype(np.float32, casting="same_kind"))
    elif source.dtype.kind in "iu" and NUMPY[dtype].kind in "iu":
        limits = np.iinfo(NUMPY[dtype])
        if source.min() < limits.min or source.max() > limits.max:
            raise OverflowError(f"values from {source.min()} to {source.max()} do not fit {dtype}")
        source = source.astype(NUMPY[dtype])
    else:
        source = source.astype(NUMPY[dtype], casting="same_kind")
    return Array(dtype=dtype, shape=source.shape, data=source.tobytes())


def to_numpy(array: Array) -> NDArray[Any]:
    """A read-only view of the array's bytes, of its shape; ``bf2`` and ``e4m3`` as their bits.

    Raises CorruptRecord when bytes and shape disagree.
    """
    kind = NUMPY[array.dtype]
    if min(array.shape, default=0) < 0 or math.prod(array.shape) * kind.itemsize != len(array.data):
        raise CorruptRecord(f"{describe(array)}: {len(array.data)} bytes do not fill this shape")
    try:
        return np.frombuffer(array.data, kind).reshape(array.shape)
    except (ValueError, OverflowError) as error:  # more dimensions than numpy has, or 0 times a size past its limits
        raise CorruptRecord(f"shape: {error}") from error


def to_float32(array: Array) -> NDArray[np.float32]:
    """The values of an array of floats as float32, exactly.  Raises CorruptRecord as ``to_numpy``."""
    values = to_numpy(array)
    if array.dtype == "e4m3":
        decoded: NDArray[np.float32] = _E4M3[values]
        return decoded
    return bf16_to_float32(values) if array.dtype == "bf2" else values.astype(np.float32, copy=False)


def feature_values(features: Features) -> NDArray[np.float32]:
    """f[n, 3d] what ``features.values`` stands for.  Raises CorruptRecord where there is nothing."""
    if features.values is None:
        raise CorruptRecord("features.values: missing")
    values = to_float32(features.values)
    return values if features.scale is None else values * to_float32(features.scale)[:, None]


def float32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bits of float32 values, rounded to nearest, ties to even; NaN stays NaN, infinity infinity."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(values.shape)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding can carry a NaN's mantissa away; setting its top bit keeps it one.
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def bf16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _all_e4m3() -> NDArray[np.float32]:
    """The value of each byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; all ones but the sign are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[code & 127 == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


_E4M3 = _all_e4m3()


def describe(array: Array) -> str:
    """``i4[3,32]``."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def tensor_bytes(trace: Trace) -> int:
    """Bytes of a trace's tensors: what it weighs in memory, names and numbers aside."""
    rounds = trace.rounds
    total = len(trace.prompt.data) + len(trace.output.data)
    total += sum(len(getattr(rounds, name).data) for name in rounds.__struct_fields__)
    return total + sum(len(array.data) for array in (trace.features.values, trace.features.scale) if array)
