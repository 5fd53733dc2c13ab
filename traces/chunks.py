"""Records cut into messages that a broker takes, and put together again.

A record that fits goes as it is; a longer one as chunks, in order, under one key (the request id), so that they
stay in one partition:

    magic "LDCH" | msgpack array [key, trace id, index, count, data]
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec
from livedraft.contracts.errors import CorruptRecord, SettingsError

MAGIC = b"LDCH"
#: The smallest limit on messages that leaves room for data beside the ids.
MIN_MESSAGE_BYTES = 1024


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a record: number ``index`` of ``count``."""

    key: str
    trace_id: str
    index: int
    count: int
    data: bytes


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Chunk)


def split(record: bytes, *, key: str, trace_id: str, message_bytes: int) -> list[bytes]:
    """The messages of a record, in order, none above ``message_bytes``.

    Raises SettingsError when ``message_bytes`` leaves no room for data.
    """
    if len(record) <= message_bytes:
        return [record]
    # 12: the msgpack heads of two integers and of the data, at their longest, less those of the empty chunk.
    empty = len(MAGIC) + len(_ENCODER.encode(Chunk(key, trace_id, 0, 0, b""))) + 12
    room = message_bytes - empty
    if room <= 0:
        raise SettingsError(f"message_bytes is {message_bytes}, expected more than {empty}")
    pieces = [record[at : at + room] for at in range(0, len(record), room)]
    return [
        MAGIC + _ENCODER.encode(Chunk(key, trace_id, index, len(pieces), piece)) for index, piece in enumerate(pieces)
    ]


class Assembler:
    """Puts records together from messages in the order of their partition.

        for message in messages:
            if (record := assembler.add(message)) is not None:
                use(record)

    A record whose writer died half-way never completes: it is given up, and counted in ``incomplete``, after
    ``max_messages`` more messages, or sooner when more than ``max_bytes`` wait.  Chunks seen before are ignored.
    """

    def __init__(self, *, max_messages: int = 1024, max_bytes: int = 256 << 20) -> None:
        self.incomplete = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._seen = 0
        self._held = 0
        #: (key, trace id) -> (number of the message it began with, count, pieces so far); oldest first.
        self._open: OrderedDict[tuple[str, str], tuple[int, int, list[bytes]]] = OrderedDict()

    def add(self, message: bytes) -> bytes | None:
        """The record that ``message`` is or completes, else None.  Raises CorruptRecord for a chunk that is none."""
        self._seen += 1
        record = self._add_chunk(_read(message)) if message[:4] == MAGIC else message
        self._expire()
        return record

    def _add_chunk(self, chunk: Chunk) -> bytes | None:
        name = (chunk.key, chunk.trace_id)
        if name not in self._open:
            if chunk.index:  # of a record given up, or of one completed before
                return None
            self._open[name] = (self._seen, chunk.count, [])
        _, count, pieces = self._open[name]
        if chunk.index < len(pieces) and chunk.count == count:
            return None
        if chunk.index > len(pieces) or chunk.count != count:
            # One in between is missing for good, as messages come in order.
            self._give_up(name)
            return None
        pieces.append(chunk.data)
        self._held += len(chunk.data)
        return b"".join(self._close(name)) if len(pieces) == count else None

    def _expire(self) -> None:
        while self._open:
            name, (began, _, _) = next(iter(self._open.items()))
            if self._seen - began <= self._max_messages and self._held <= self._max_bytes:
                return
            self._give_up(name)

    def _give_up(self, name: tuple[str, str]) -> None:
        self._close(name)
        self.incomplete += 1

    def _close(self, name: tuple[str, str]) -> list[bytes]:
        pieces = self._open.pop(name)[2]
        self._held -= sum(map(len, pieces))
        return pieces


def _read(message: bytes) -> Chunk:
    try:
        chunk = _DECODER.decode(memoryview(message)[len(MAGIC) :])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptRecord(f"chunk: {error}") from error
    if not 0 <= chunk.index < chunk.count:
        raise CorruptRecord(f"chunk: index {chunk.index} of {chunk.count}")
    return chunk
