"""What the settings mean to a Kafka client and a broker.  Pure: nothing here knows the client."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from livedraft.contracts.errors import SettingsError, TraceError
from livedraft.contracts.settings import Kafka

TRACES, DRAFTS, SWAPS, DEAD = "traces", "drafts", "swaps", "dead"

#: Milliseconds for finding the broker, and for one question to it.
CONNECT_MS, ANSWER_MS = 5000, 5000
#: Fetched at once, from all partitions: what stays in a processor's cache is parsed and decoded half as fast again.
#: A larger message still comes.
_FETCH_BYTES = 2 << 20


def topic(settings: Kafka, name: str) -> str:
    """The full name of a topic."""
    return f"{settings.prefix}.{name}"


def partition_name(topic: str, partition: int) -> str:
    """How a partition is called in ``Offsets``."""
    return f"{topic}/{partition}"


def partition_of(name: str) -> tuple[str, int]:
    """Inverse of ``partition_name``.  Raises TraceError."""
    topic, separator, number = name.rpartition("/")
    if not separator or not number.isdecimal():
        raise TraceError(f"partition {name!r}: expected topic/number; the offsets are another stream's")
    return topic, int(number)


def first_offset(sought: int | None, committed: int | None, *, by_other: bool) -> int:
    """Where to begin with a partition; ``by_other``: the group's offset was committed by another member than us.

    Our own offsets come from a checkpoint, which is never behind what we committed, unless it was set back on
    purpose.  Another member has committed only after the partition had left us: what it says is newer.
    """
    if sought is None or committed is None:
        return sought or committed or 0
    return max(sought, committed) if by_other else sought


def check(settings: Kafka) -> None:
    """Raises SettingsError for what would only fail at the first connection."""
    for field in ("tls_ca", "tls_certificate", "tls_key"):
        path = getattr(settings, field)
        if path is not None and not Path(path).is_file():
            raise SettingsError(f"kafka.{field} is {path!r}, expected a PEM file")
    if settings.security.startswith("sasl"):
        password(settings)
    if settings.compression == "zstd" and importlib.util.find_spec("zstandard") is None:
        raise SettingsError("kafka.compression is 'zstd', which needs the package zstandard")


def topics(settings: Kafka) -> dict[str, dict[str, Any]]:
    """Full name -> what a topic is created with."""
    bounded = {
        "retention.ms": str(int(settings.retention_hours * 3_600_000)),
        "retention.bytes": str(settings.retention_bytes),
        "max.message.bytes": str(settings.max_message_bytes),
    }
    kept = {"retention.ms": "-1", "max.message.bytes": str(settings.max_message_bytes)}
    wanted = {TRACES: (settings.partitions, bounded), DEAD: (1, bounded), DRAFTS: (1, kept), SWAPS: (1, kept)}
    return {
        topic(settings, name): {
            "num_partitions": partitions,
            "replication_factor": settings.replication,
            "configs": configs,
        }
        for name, (partitions, configs) in wanted.items()
    }


def connecting(brokers: Sequence[str], settings: Kafka) -> dict[str, Any]:
    """Options of every client.  Raises SettingsError."""
    options = {
        "bootstrap_servers": list(brokers),
        "client_id": "livedraft",
        "bootstrap_timeout_ms": CONNECT_MS,
        "reconnect_backoff_max_ms": 1000,
        "security_protocol": settings.security.upper(),
        "ssl_cafile": settings.tls_ca,
        "ssl_certfile": settings.tls_certificate,
        "ssl_keyfile": settings.tls_key,
        "ssl_check_hostname": settings.tls_check_hostname,
    }
    if settings.security.startswith("sasl"):
        options |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": password(settings),
        }
    return options


def producing(settings: Kafka) -> dict[str, Any]:
    """Options of a producer."""
    return {
        "acks": "all",
        "enable_idempotence": False,
        "max_in_flight_requests_per_connection": 1,
        "max_request_size": settings.max_message_bytes,
        "batch_size": 1 << 20,
        "linger_ms": settings.linger_ms,
        "compression_type": None if settings.compression == "none" else settings.compression,
        "delivery_timeout_ms": int(settings.delivery_timeout_s * 1000),
        "request_timeout_ms": max(100, min(30_000, int(settings.delivery_timeout_s * 1000) - settings.linger_ms)),
        "max_block_ms": ANSWER_MS,
    }


def consuming(settings: Kafka) -> dict[str, Any]:
    """Options of a consumer."""
    return {
        "auto_offset_reset": "earliest",
        "fetch_max_bytes": _FETCH_BYTES,
        "max_partition_fetch_bytes": settings.max_message_bytes,
    }


def sharing(settings: Kafka, group: str) -> dict[str, Any]:
    """Options of a consumer that shares partitions with its group."""
    return {
        "group_id": group,
        "enable_auto_commit": False,
        "session_timeout_ms": int(settings.session_timeout_s * 1000),
        "heartbeat_interval_ms": int(settings.session_timeout_s * 250),
    }


def password(settings: Kafka) -> str:
    """The one for SASL.  Raises SettingsError."""
    if settings.sasl_username is None:
        raise SettingsError(f"kafka.sasl_username is not set, expected a name for security {settings.security!r}")
    if settings.sasl_password is not None:
        return settings.sasl_password
    if settings.sasl_password_file is None:
        raise SettingsError("kafka.sasl_password_file is not set, expected a file with the password of sasl_username")
    try:
        return Path(settings.sasl_password_file).read_text().splitlines()[0]
    except (OSError, IndexError) as error:
        raise SettingsError(f"kafka.sasl_password_file {settings.sasl_password_file}: {error}") from error
