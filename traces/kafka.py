"""The stream on Kafka: clients, and what is sent.  ``kafka_source`` and ``kafka_reader`` read.

Delivery: the producer runs without idempotence, because kafka-python's never sends again once a batch has outlived
its timeout, and with one request in flight per connection, so that a retry does not reorder the chunks of a trace.
What arrives twice is recognised by its trace id.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import (
    InvalidRecordError,
    InvalidTopicError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAlreadyExistsError,
)
from kafka.net.compat import KafkaNetClient
from livedraft.contracts.errors import SettingsError, StreamUnavailable, TraceError
from livedraft.contracts.settings import Kafka
from livedraft.traces.kafka_settings import (
    ANSWER_MS,
    CONNECT_MS,
    DEAD,
    TRACES,
    connecting,
    consuming,
    producing,
    topic,
    topics,
)
from livedraft.traces.parcel import Parcel

log = logging.getLogger(__name__)
logging.getLogger("kafka").setLevel(logging.ERROR)  # it tells of every connection, retry and rebalance

#: What sending again does not help.
_REFUSALS = (MessageSizeTooLargeError, RecordListTooLargeError, InvalidRecordError, InvalidTopicError)


def ensure_topics(brokers: Sequence[str], settings: Kafka) -> None:
    """Create the topics that do not exist.  Raises StreamUnavailable, SettingsError."""
    admin = client(KafkaAdminClient, brokers, settings)
    try:
        existing = set(admin.list_topics())
        for name, spec in topics(settings).items():
            if name not in existing:
                try:
                    admin.create_topics({name: spec}, timeout_ms=ANSWER_MS)
                except TopicAlreadyExistsError:  # another process was quicker
                    continue
    except KafkaError as error:
        raise StreamUnavailable(f"creating topics {settings.prefix}.*: {error!r}") from error
    finally:
        admin.close()


class KafkaSender:
    """``Sender`` to ``<prefix>.<name>``.  Raises StreamUnavailable where there is no broker to be had."""

    def __init__(self, brokers: Sequence[str], settings: Kafka, name: str = TRACES) -> None:
        if settings.create_topics:
            ensure_topics(brokers, settings)
        self._topic = topic(settings, name)
        self._producer = _producer(brokers, settings)
        try:
            self._producer.partitions_for(self._topic)  # so that no send waits for it
        except KafkaError as error:
            self.close(0.0)
            raise StreamUnavailable(f"topic {self._topic}: {error!r}") from error

    def send(self, parcel: Parcel, done: Callable[[Exception | None], None]) -> None:
        """As ``Sender.send``."""
        _Acknowledgements(len(parcel.messages), done).follow(
            self._send(self._producer.send, parcel, message) for message in parcel.messages
        )

    def close(self, timeout: float) -> None:
        """As ``Sender.close``."""
        self._producer.close(timeout)

    def _send(self, send: Callable[..., Any], parcel: Parcel, message: bytes) -> Any:
        return send(self._topic, message, key=parcel.key, headers=list(parcel.headers))


class _Acknowledgements:
    """Counts the messages of a parcel; all but ``follow`` on the client's thread."""

    def __init__(self, count: int, done: Callable[[Exception | None], None]) -> None:
        self._left = count
        self._done = done

    def follow(self, futures: Iterable[Any]) -> None:
        """Send, one after the other."""
        sent = 0
        try:
            for future in futures:
                future.add_callback(self._acknowledged)
                future.add_errback(self._failed)
                sent += 1
        except (KafkaError, ValueError) as error:  # ValueError: a topic without partitions
            if not sent and not isinstance(error, _REFUSALS):
                raise StreamUnavailable(f"{error!r}") from error
            self._failed(error)

    def _acknowledged(self, _: object) -> None:
        self._left -= 1
        if self._left == 0:
            self._done(None)

    def _failed(self, error: Exception) -> None:
        if self._left > 0:
            self._left = 0
            kind = TraceError if isinstance(error, _REFUSALS) else StreamUnavailable
            self._done(kind(f"{error!r}"))


class DeadLetters:
    """Copies what could not be read to ``<prefix>.dead``, with the reason and where it was in its headers."""

    def __init__(self, brokers: Sequence[str], settings: Kafka) -> None:
        self._brokers, self._settings = brokers, settings
        self._producer: Any = None

    def bury(self, record: ConsumerRecord, reason: str) -> None:
        """Queue a copy; a broker that does not take it costs a warning."""
        place = {"reason": reason, "topic": record.topic, "partition": record.partition, "offset": record.offset}
        headers = [*record.headers, *((name, str(value).encode()) for name, value in place.items())]
        try:
            if self._producer is None:
                self._producer = _producer(self._brokers, self._settings)
            future = self._producer.send(topic(self._settings, DEAD), record.value, key=record.key, headers=headers)
            future.add_errback(self._failed)
        except (KafkaError, ValueError, StreamUnavailable) as error:
            self._failed(error)

    def flush(self) -> None:
        """Wait, for seconds at most, until the broker has all copies."""
        if self._producer is not None:
            try:
                self._producer.flush(ANSWER_MS / 1000)
            except KafkaError as error:
                self._failed(error)

    def close(self) -> None:
        """Send what is queued."""
        if self._producer is not None:
            self._producer.close(1.0)

    def _failed(self, error: Exception) -> None:
        log.warning("a dead letter was not copied: %r", error)


class RawClient:
    """kafka-python on ``<prefix>.traces`` with nothing of ours around it: what a measurement is compared with."""

    def __init__(self, brokers: Sequence[str], settings: Kafka) -> None:
        self._topic = topic(settings, TRACES)
        self._producer = _producer(brokers, settings)
        self._consumer = client(KafkaConsumer, brokers, settings, **consuming(settings))
        self._consumer.assign([TopicPartition(self._topic, n) for n in range(settings.partitions)])

    def send(self, key: bytes, message: bytes) -> None:
        """Queue it."""
        self._producer.send(self._topic, message, key=key)

    def flush(self) -> None:
        """Until all are acknowledged."""
        self._producer.flush()

    def poll(self) -> int:
        """How many messages came."""
        return sum(map(len, self._consumer.poll(timeout_ms=200).values()))

    def close(self) -> None:
        """Let go of both."""
        self._producer.close(1.0)
        self._consumer.close()


def _producer(brokers: Sequence[str], settings: Kafka) -> Any:
    return client(_Producer, brokers, settings, **producing(settings))


class _Producer(KafkaProducer):  # type: ignore[misc]
    """Closes on time: the client's own leaves its thread and its messages behind when it cannot flush first."""

    _closing = False

    def close(self, timeout: float | None = None, null_logger: bool = False) -> None:
        """What is not acknowledged within ``timeout`` seconds is given up."""
        self._closing = True
        super().close(timeout, null_logger)

    def flush(self, timeout: float | None = None) -> None:
        """Raises KafkaTimeoutError, unless this is a part of closing."""
        try:
            super().flush(timeout)
        except KafkaTimeoutError:
            if not self._closing:
                raise


def client(kind: Callable[..., Any], brokers: Sequence[str], settings: Kafka, **more: Any) -> Any:
    """A connected client with the settings that all of them share.  Raises StreamUnavailable, SettingsError."""
    options = connecting(brokers, settings)
    _knock(brokers)
    made: list[KafkaNetClient] = []

    def keep(**given: Any) -> KafkaNetClient:
        made.append(KafkaNetClient(**given))
        return made[-1]

    try:
        return kind(**options, **more, kafka_client=keep)
    except KafkaError as error:
        for client in made:  # it leaves a thread and sockets behind when it cannot start
            client.close()
        raise StreamUnavailable(f"no broker at {', '.join(brokers)}: {error!r}") from error
    except (OSError, ValueError, RuntimeError) as error:  # certificates, combinations, codecs that are not installed
        raise SettingsError(f"[kafka]: {error}") from error


def _knock(brokers: Sequence[str]) -> None:
    """A refused connection is told at once; the client would try again for seconds, and tell nothing of it."""
    refusals = []
    for broker in brokers:
        host, _, port = broker.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_MS / 1000).close()
            return
        except OSError as error:
            refusals.append(f"{broker} ({error})")
    raise StreamUnavailable(f"no broker at {', '.join(refusals)}")
