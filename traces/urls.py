"""The stream that a URL in the settings names."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from livedraft.contracts.errors import SettingsError
from livedraft.contracts.ports import Announcements, TraceSource
from livedraft.contracts.settings import Kafka, Traces
from livedraft.traces.kafka_settings import DRAFTS, SWAPS, check
from livedraft.traces.outlet import BrokerOutlet
from livedraft.traces.redaction import Redactor
from livedraft.traces.sink import QueuedSink
from livedraft.traces.source import SpoolSource
from livedraft.traces.spill import Spill
from livedraft.traces.spool import SpoolWriter
from livedraft.traces.spool_sink import SpoolSink

log = logging.getLogger(__name__)

SPOOL, KAFKA = "spool://", "kafka://"
KNOWN = (SPOOL, KAFKA)
#: What a message gains on its way: key, headers and the batch around it.
_ENVELOPE_BYTES = 4096


def open_sink(settings: Traces, redactor: Redactor | None = None, kafka: Kafka | None = None) -> QueuedSink:
    """The sink of ``settings.url``; a broker need not be there yet.

    Raises SettingsError for an unknown URL or settings that cannot work, TraceError when another process already
    writes there.
    """
    if settings.url.startswith(KAFKA):
        outlet = _broker_outlet(settings, kafka or Kafka())
        return QueuedSink(
            outlet, buffer_bytes=settings.buffer_bytes, message_bytes=settings.message_bytes, redactor=redactor
        )
    folder = spool_folder(settings.url)
    return SpoolSink(
        lambda: SpoolWriter(
            folder,
            segment_bytes=settings.segment_bytes,
            retain_bytes=settings.retain_bytes,
            fsync=settings.fsync,
        ),
        buffer_bytes=settings.buffer_bytes,
        message_bytes=settings.message_bytes,
        redactor=redactor,
    )


def open_source(
    settings: Traces, group: str, kafka: Kafka | None = None, share: tuple[int, int] | None = None
) -> TraceSource:
    """A source of ``settings.url`` for a consumer group.

    ``share`` (rank, ranks) takes so many partitions of a broker, as ``KafkaSource`` tells; a spool has but one.
    Raises SettingsError for an unknown URL or a bad name, StreamUnavailable when a broker does not answer.
    """
    if settings.url.startswith(KAFKA):
        from livedraft.traces.kafka_source import KafkaSource

        return KafkaSource(broker_addresses(settings.url), kafka or Kafka(), group, share)
    return SpoolSource(spool_folder(settings.url), group)


def open_announcements(settings: Traces, kafka: Kafka) -> Announcements | None:
    """Where candidates and decisions are announced: topics beside the traces; nowhere beside a spool.

    Raises SettingsError.
    """
    if not settings.url.startswith(KAFKA):
        return None
    from livedraft.traces.announce import Announcer
    from livedraft.traces.kafka import KafkaSender

    addresses = broker_addresses(settings.url)
    check(kafka)
    drafts, swaps = (BrokerOutlet(partial(KafkaSender, addresses, kafka, name)) for name in (DRAFTS, SWAPS))
    return Announcer(drafts=drafts, swaps=swaps)


def spool_folder(url: str) -> Path:
    """``spool:///a/b`` is the folder /a/b, ``spool://a/b`` is a/b of the working directory.  Raises SettingsError."""
    if not url.startswith(SPOOL):
        raise SettingsError(f"traces.url is {url!r}, expected one of {', '.join(KNOWN)}")
    path = url.removeprefix(SPOOL)
    if not path:
        raise SettingsError(f"traces.url is {url!r}, expected a folder after spool://")
    return Path(path)


def broker_addresses(url: str) -> list[str]:
    """``kafka://one:9092,two:9092``.  Raises SettingsError."""
    addresses = url.removeprefix(KAFKA).rstrip("/").split(",")
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or "/" in address:
            raise SettingsError(f"traces.url is {url!r}, expected kafka://host:port[,host:port]")
    return addresses


def _broker_outlet(settings: Traces, kafka: Kafka) -> BrokerOutlet:
    from livedraft.traces.kafka import KafkaSender

    addresses = broker_addresses(settings.url)
    check(kafka)
    if settings.message_bytes + _ENVELOPE_BYTES > kafka.max_message_bytes:
        raise SettingsError(
            f"kafka.max_message_bytes is {kafka.max_message_bytes}, expected at least {_ENVELOPE_BYTES} more than "
            f"traces.message_bytes, which is {settings.message_bytes}"
        )
    return BrokerOutlet(
        lambda: KafkaSender(addresses, kafka),
        window_bytes=max(settings.message_bytes, settings.buffer_bytes // 4),
        spill=_open_spill(kafka),
    )


def _open_spill(kafka: Kafka) -> Spill | None:
    if kafka.spill is None:
        return None
    try:
        return Spill(Path(kafka.spill), max_bytes=kafka.spill_bytes)
    except OSError as error:  # serving goes on, as without one
        log.warning("kafka.spill cannot be used, traces that the broker does not take are dropped: %s", error)
        return None
