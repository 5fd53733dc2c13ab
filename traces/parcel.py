"""A trace ready to go: what a sink hands to whatever writes or sends it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from livedraft.contracts.errors import CorruptRecord
from livedraft.contracts.messages import Record, Trace
from livedraft.traces.chunks import Assembler, split
from livedraft.traces.codec import decode, encode

#: Names of the headers that a broker keeps beside a message, so that it can be routed and counted unread.
SCHEMA, TARGET, DRAFTER, TENANT = "schema", "target", "drafter", "tenant"


class Parcel(Record, frozen=True, kw_only=True, array_like=True, omit_defaults=False):
    """The messages of one record in order, under one key that keeps them in one partition."""

    key: bytes
    headers: tuple[tuple[str, bytes], ...]
    messages: tuple[bytes, ...]
    #: Unix seconds at which the request ended.
    at: float

    @property
    def size(self) -> int:
        """Bytes of the messages."""
        return sum(map(len, self.messages))


def pack(trace: Trace, message_bytes: int) -> Parcel:
    """A trace, keyed by its request id and cut into messages of at most ``message_bytes``."""
    messages = split(encode(trace), key=trace.request_id, trace_id=trace.trace_id, message_bytes=message_bytes)
    return _addressed(trace, messages)


def repack(messages: Sequence[bytes]) -> Parcel:
    """The parcel whose messages these are, unchanged.  Raises TraceError unless they are one whole trace."""
    assembler = Assembler()
    whole = [record for message in messages if (record := assembler.add(message)) is not None]
    if len(whole) != 1:
        raise CorruptRecord(f"{len(messages)} messages that make {len(whole)} traces")
    return _addressed(decode(whole[0]), messages)


def _addressed(trace: Trace, messages: Sequence[bytes]) -> Parcel:
    headers = {
        SCHEMA: f"{trace.schema_major}.{trace.schema_minor}",
        TARGET: f"{trace.target}@{trace.target_revision}",
        DRAFTER: trace.drafters[-1] if trace.drafters else "",
        TENANT: trace.tenant,
    }
    return Parcel(
        key=_utf8(trace.request_id),
        headers=tuple((name, _utf8(value)) for name, value in headers.items()),
        messages=tuple(messages),
        at=trace.finished_at,
    )


def dump(parcel: Parcel) -> bytes:
    """A parcel as one record of a spool."""
    return msgspec.msgpack.encode(parcel)


def load(record: bytes) -> Parcel:
    """Inverse of ``dump``.  Raises msgspec.DecodeError for anything else."""
    return msgspec.msgpack.decode(record, type=Parcel)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
