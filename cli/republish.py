"""Messages of one stream sent into another, unchanged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
from livedraft.contracts.errors import TraceError
from livedraft.contracts.settings import Settings
from livedraft.traces.chunks import MAGIC, Chunk
from livedraft.traces.frames import Frame
from livedraft.traces.outlet import BrokerOutlet
from livedraft.traces.parcel import repack
from livedraft.traces.reader import SpoolReader
from livedraft.traces.sink import WRITTEN
from livedraft.traces.spool import SpoolWriter
from livedraft.traces.urls import KAFKA, broker_addresses, spool_folder

#: Seconds that a broker has for the last messages.
_CLOSE_S = 60.0


def trace_start(folder: Path, offset: int) -> int:
    """Offset of the first record of the trace that record ``offset`` is a chunk of: itself, unless it was cut."""
    with contextlib.closing(SpoolReader(folder, offset)) as reader:
        record = reader.read()
    if not isinstance(record, Frame) or record.offset != offset:
        return offset
    chunk = _chunk(record.payload)
    return offset - chunk.index if chunk else offset


class Target(Protocol):
    """Where the messages of whole traces go."""

    def append(self, messages: Sequence[bytes]) -> object:
        """Those of one trace."""

    def close(self) -> None:
        """Until all are there."""


class TopicTarget:
    """A topic, sent to no faster than it acknowledges.  Raises StreamUnavailable when there is no broker."""

    def __init__(self, settings: Settings, url: str) -> None:
        from livedraft.traces.kafka import KafkaSender

        addresses = broker_addresses(url)
        KafkaSender(addresses, settings.kafka).close(0.0)
        self._outlet = BrokerOutlet(lambda: KafkaSender(addresses, settings.kafka))
        #: Traces that are none, or were not taken.
        self.refused = 0

    def append(self, messages: Sequence[bytes]) -> None:
        """As ``Target.append``."""
        try:
            self._outlet.put(repack(messages), self._settle)
        except TraceError:
            self.refused += 1

    def close(self) -> None:
        """As ``Target.close``, within the delivery timeout."""
        self._outlet.hurry(time.monotonic() + _CLOSE_S)
        self._outlet.close()

    def _settle(self, fate: str) -> None:
        self.refused += fate != WRITTEN


def open_target(settings: Settings, url: str) -> SpoolWriter | TopicTarget:
    """Raises SettingsError, TraceError when another process writes there, StreamUnavailable."""
    kept = settings.traces
    if url.startswith(KAFKA):
        return TopicTarget(settings, url)
    return SpoolWriter(
        spool_folder(url), segment_bytes=kept.segment_bytes, retain_bytes=kept.retain_bytes, fsync=kept.fsync
    )


def whole_traces(messages: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, list[bytes]]]:
    """The messages of each trace together, with the offset of the last; chunks of several may alternate."""
    begun: dict[tuple[str, str], list[bytes]] = {}
    for offset, message in messages:
        chunk = _chunk(message)
        if chunk is None:
            yield offset, [message]
            continue
        name = (chunk.key, chunk.trace_id)
        held = begun.setdefault(name, [])
        if chunk.index == len(held):
            held.append(message)
        if len(held) == chunk.count:
            yield offset, begun.pop(name)


def spool_messages(folder: Path, first: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each readable record from ``first`` on."""
    with contextlib.closing(SpoolReader(folder, trace_start(folder, first))) as reader:
        while (record := reader.read()) is not None:
            if isinstance(record, Frame):
                yield record.offset, record.payload


def _chunk(message: bytes) -> Chunk | None:
    """The chunk that ``message`` is; None for a whole trace, and for what its readers will refuse."""
    if not message.startswith(MAGIC):
        return None
    try:
        return msgspec.msgpack.decode(memoryview(message)[len(MAGIC) :], type=Chunk)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
