"""One trace to bytes and back.

    magic "LDTR" | u2 major | u2 minor | u2 flags | msgpack map of the Trace's fields

Little-endian; the header's version is the trace's.  Flag 1: ``features.values`` holds packed byte planes
(``planes``).  Tensors are raw little-endian bytes otherwise.

Evolution: a new field raises the minor version; older readers keep it, unread (``ExtendedTrace``), so that a relay
or a replay loses nothing.  Anything an older reader would misread (a changed meaning, default or flag, a new
element of ``Array``) raises the major version, which older readers refuse.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
from livedraft.contracts.errors import CorruptRecord, TraceError, UnsupportedSchema
from livedraft.contracts.messages import SCHEMA_MAJOR, SCHEMA_MINOR, Array, Features, Rounds, Sampling, Trace
from livedraft.traces import planes
from livedraft.traces.arrays import NUMPY, describe, to_float32, to_numpy
from livedraft.traces.validation import validate

MAGIC = b"LDTR"
PACKED_FEATURES = 1

#: Bytes of messages validated together: enough to share the cost, few enough to stay in a processor's cache.
_TOGETHER_BYTES = 1 << 20

A = TypeVar("A")
B = TypeVar("B")

_HEADER = struct.Struct("<4sHHH")
_ENCODER = msgspec.msgpack.Encoder()
_TRACE = msgspec.msgpack.Decoder(Trace)
_MAP = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
#: The records of a trace that may gain fields, and those we know; "" is the trace itself.
_PARTS = {
    part: frozenset(kind.__struct_fields__)
    for part, kind in {"": Trace, "sampling": Sampling, "rounds": Rounds, "features": Features}.items()
}


class ExtendedTrace(Trace, frozen=True, kw_only=True):
    """A trace of a newer minor version: the fields this reader does not know ride along and are encoded again.

    ``unknown``: part ("" for the trace itself, "rounds", ...) -> field -> its msgpack bytes.
    """

    unknown: dict[str, dict[str, bytes]]


def encode(trace: Trace, *, packed: bool = True) -> bytes:
    """The record of a trace.  It is not validated: a reader does that, and need not trust a writer.

    ``packed=False`` leaves the features uncompressed: little more than a copy, for whoever has no time.
    """
    flags, values = 0, trace.features.values
    if packed and values is not None:
        planed = planes.pack(values.data, NUMPY[values.dtype].itemsize)
        trace = _with_feature_bytes(trace, values, planed)
        flags = PACKED_FEATURES
    body = _ENCODER.encode(_merged(trace) if isinstance(trace, ExtendedTrace) else trace)
    return _HEADER.pack(MAGIC, trace.schema_major, trace.schema_minor, flags) + body


def decode(message: bytes) -> Trace:
    """A validated trace.

    Raises UnsupportedSchema for another major version, or for a newer minor one that this reader cannot make
    sense of, and CorruptRecord for everything else that is not a trace; never anything else.
    """
    trace = _read(message)
    _validate(trace)
    return trace


def decode_all(messages: Iterable[bytes | TraceError]) -> list[Trace | TraceError]:
    """``decode`` of each, what it would raise as a value; errors pass.

    Traces are validated together, a megabyte or so at a time: small ones cost half of what ``decode`` takes.
    """
    found: list[Trace | TraceError] = []
    begin = size = 0
    for message in messages:
        found.append(message if isinstance(message, TraceError) else _attempt(_read, message))
        size += 0 if isinstance(message, TraceError) else len(message)
        if size >= _TOGETHER_BYTES:
            _validate_together(found, begin)
            begin, size = len(found), 0
    _validate_together(found, begin)
    return found


def _validate_together(found: list[Trace | TraceError], begin: int) -> None:
    """Replace those from ``begin`` on that are none by their errors."""
    try:
        validate(*(trace for trace in found[begin:] if isinstance(trace, Trace)))
    except CorruptRecord:  # whose is it?
        for place, trace in enumerate(found[begin:], begin):
            if isinstance(trace, Trace) and (error := _attempt(_validate, trace)) is not None:
                found[place] = error


def _attempt(action: Callable[[A], B], given: A) -> B | TraceError:
    try:
        return action(given)
    except TraceError as error:
        return error


def _read(message: bytes) -> Trace:
    """A trace that is not validated."""
    if len(message) < _HEADER.size or message[:4] != MAGIC:
        raise CorruptRecord(f"starts with {message[:4]!r}, expected {MAGIC!r}")
    _, major, minor, flags = _HEADER.unpack_from(message)
    if major != SCHEMA_MAJOR:
        raise UnsupportedSchema(f"schema {major}.{minor}, this reader knows {SCHEMA_MAJOR}.{SCHEMA_MINOR}")
    if flags & ~PACKED_FEATURES:
        raise UnsupportedSchema(f"flags {flags:#x}, this reader knows {PACKED_FEATURES:#x}")
    body = memoryview(message)[_HEADER.size :]
    try:
        trace = msgspec.structs.replace(_TRACE.decode(body), schema_major=major, schema_minor=minor)
        if flags & PACKED_FEATURES:
            trace = _unpacked(trace)
        unknown = _unknown_fields(body) if minor > SCHEMA_MINOR else {}
    except (CorruptRecord, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(major, minor, error) from error
    return ExtendedTrace(**_fields(trace), unknown=unknown) if unknown else trace


def _validate(trace: Trace) -> None:
    try:
        validate(trace)
    except CorruptRecord as error:
        raise _refusal(trace.schema_major, trace.schema_minor, error) from error


def _refusal(major: int, minor: int, error: Exception) -> TraceError:
    kind = UnsupportedSchema if minor > SCHEMA_MINOR else CorruptRecord
    return kind(f"schema {major}.{minor}: {error}")


def to_json(trace: Trace, *, whole: bool = False) -> dict[str, Any]:
    """Plain values for printing: arrays as ``i4[12]``, or as nested lists when ``whole``."""
    plain: dict[str, Any] = _plain(trace, whole)
    return plain


def _unpacked(trace: Trace) -> Trace:
    values = trace.features.values
    if values is None:
        raise CorruptRecord("features.values: missing, but flagged as packed")
    itemsize = NUMPY[values.dtype].itemsize
    return _with_feature_bytes(trace, values, planes.unpack(values.data, itemsize, itemsize * math.prod(values.shape)))


def _with_feature_bytes(trace: Trace, values: Array, data: bytes) -> Trace:
    replace = msgspec.structs.replace
    return replace(trace, features=replace(trace.features, values=replace(values, data=data)))


def _unknown_fields(body: memoryview) -> dict[str, dict[str, bytes]]:
    top = _MAP.decode(body)
    unknown = {}
    for part, known in _PARTS.items():
        fields = _MAP.decode(top[part]) if part else top
        if not fields.keys() <= known:
            unknown[part] = {name: bytes(raw) for name, raw in fields.items() if name not in known}
    return unknown


def _merged(trace: ExtendedTrace) -> dict[str, Any]:
    fields = _fields(trace)
    del fields["unknown"]
    for part, new in trace.unknown.items():
        raw = {name: msgspec.Raw(value) for name, value in new.items()}
        if part:
            fields[part] = _fields(fields[part]) | raw
        else:
            fields |= raw
    return fields


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def _plain(value: Any, whole: bool) -> Any:
    if isinstance(value, Array):
        if not whole:
            return describe(value)
        return (to_float32(value) if value.dtype == "bf2" else to_numpy(value)).tolist()
    if isinstance(value, msgspec.Struct):
        return {name: _plain(field, whole) for name, field in _fields(value).items()}
    return msgspec.to_builtins(value)
