"""kafka-python as the stream uses it; no other file imports it.

Partitions go by their names, as in ``Offsets``, and what the client raises becomes an error of ours: ``NoAnswer``
where asking again may help, TraceError for a message that no broker will take, else StreamUnavailable.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
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
from kafka.net.inet import KafkaNetSocket
from kafka.structs import MemberState, OffsetAndMetadata
from livedraft.contracts.errors import SettingsError, StreamUnavailable, TraceError
from livedraft.contracts.messages import Offsets
from livedraft.contracts.settings import Kafka
from livedraft.traces.kafka_settings import (
    ANSWER_MS,
    CONNECT_MS,
    TRACES,
    connecting,
    consuming,
    partition_name,
    partition_of,
    producing,
    sharing,
    topic,
    topics,
)

log = logging.getLogger(__name__)
logging.getLogger("kafka").setLevel(logging.ERROR)  # it tells of every connection, retry and rebalance

#: What sending again does not help.
_REFUSALS = (MessageSizeTooLargeError, RecordListTooLargeError, InvalidRecordError, InvalidTopicError)

_RECEIVE_BYTES = 64 << 10
#: How long a producer's thread sleeps where a connection takes no request, unless something happens before.
_PATIENCE_MS = 100.0

P = ParamSpec("P")
R = TypeVar("R")
Headers = Sequence[tuple[str, bytes]]


class NoAnswer(StreamUnavailable):
    """For now: the same question may be answered later."""


class Message(Protocol):
    """One that was fetched."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers


class Owner(Protocol):
    """Whoever reads partitions that a group shares.  Called on the client's thread, while ``poll`` waits."""

    def assigned(self, names: set[str]) -> None:
        """They came; nothing may wait for the broker here."""

    async def revoked(self, names: set[str]) -> None:
        """They are about to leave."""

    def lost(self, names: set[str]) -> None:
        """They left, and nothing was handed over."""


def ensure_topics(brokers: Sequence[str], settings: Kafka) -> None:
    """Create the topics that do not exist.  Raises StreamUnavailable, SettingsError."""
    admin = _connected(KafkaAdminClient, brokers, settings)
    try:
        existing = set(admin.list_topics())
        for name, spec in topics(settings).items():
            if name not in existing:
                try:
                    admin.create_topics({name: spec}, timeout_ms=ANSWER_MS)
                except TopicAlreadyExistsError:  # another process was quicker
                    continue
    except KafkaError as error:
        raise _ours(f"creating topics {settings.prefix}.*", error) from error
    finally:
        admin.close()


class Producer:
    """Sends to one topic.

    Without idempotence, because kafka-python's never sends again once a batch has outlived its timeout, and with one
    request in flight per connection, so that a retry does not reorder the messages of a key.
    """

    def __init__(self, brokers: Sequence[str], settings: Kafka, name: str) -> None:
        self._topic = topic(settings, name)
        self._client = _connected(_Producer, brokers, settings, _Patient, **producing(settings))

    def find_topic(self) -> None:
        """So that no ``send`` waits for it.  Raises StreamUnavailable."""
        try:
            self._client.partitions_for(self._topic)
        except KafkaError as error:
            raise _ours(f"topic {self._topic}", error) from error

    def send(self, key: bytes | None, value: bytes | None, headers: Headers, done: Callable[[Any], None]) -> None:
        """Queue a message; ``done`` gets None or an error once, on the client's thread.

        Raises StreamUnavailable or TraceError when it was not queued; then ``done`` is not called.
        """
        try:
            future = self._client.send(self._topic, value, key=key, headers=list(headers))
        except (KafkaError, ValueError) as error:  # ValueError: a topic without partitions
            raise _ours(self._topic, error) from error
        future.add_callback(lambda _: done(None))
        future.add_errback(lambda error: done(_ours(self._topic, error)))

    def flush(self, timeout: float) -> None:
        """Wait until all is acknowledged.  Raises StreamUnavailable after ``timeout`` seconds."""
        try:
            self._client.flush(timeout)
        except KafkaError as error:
            raise _ours(self._topic, error) from error

    def close(self, timeout: float) -> None:
        """Send what is queued; what is not acknowledged within ``timeout`` seconds is given up."""
        self._client.close(timeout)


def _told(ask: Callable[Concatenate[Consumer, P], R]) -> Callable[Concatenate[Consumer, P], R]:
    @functools.wraps(ask)
    def asked(consumer: Consumer, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return ask(consumer, *args, **kwargs)
        except KafkaError as error:
            raise _ours(consumer.topic, error) from error

    return asked


class Consumer:
    """Reads ``<prefix>.traces``, with a group or for itself alone."""

    def __init__(self, brokers: Sequence[str], settings: Kafka, group: str | None = None) -> None:
        options = consuming(settings) | {"proxy_url": f"{_Sockets.SCHEMES[0]}://"}
        if group is not None:
            options |= {"partition_assignment_strategy": (CooperativeStickyAssignor,)} | sharing(settings, group)
        self.topic = topic(settings, TRACES)
        self._client = _connected(KafkaConsumer, brokers, settings, **options)

    @_told
    def partitions(self) -> list[str]:
        """All of the topic, in order; none where there is no such topic."""
        return [partition_name(self.topic, number) for number in sorted(self._client.partitions_for_topic(self.topic))]

    @_told
    def assign(self, names: Iterable[str]) -> None:
        """Read these."""
        self._client.assign([_place(name) for name in names])

    @_told
    def subscribe(self, owner: Owner) -> None:
        """Read what the group leaves to us."""
        self._client.subscribe([self.topic], listener=_Listener(owner))

    def assignment(self) -> set[str]:
        """What is read now."""
        return _names(self._client.assignment())

    @property
    def has_joined(self) -> bool:
        """Whether the group knows us."""
        return bool(self._client.group_metadata().state == MemberState.STABLE)

    @_told
    def poll(self, timeout: float, limit: int | None = None) -> dict[str, list[Message]]:
        """Messages that came within ``timeout`` seconds, by partition."""
        fetched = self._client.poll(timeout_ms=timeout * 1000, max_records=limit)
        return {partition_name(*place): messages for place, messages in fetched.items()}

    @_told
    def pause(self, names: Iterable[str]) -> None:
        """Fetch nothing of them for now."""
        self._client.pause(*map(_place, names))

    @_told
    def resume(self, name: str) -> None:
        """Fetch again."""
        self._client.resume(_place(name))

    @_told
    def seek(self, name: str, offset: int) -> None:
        """Go on there."""
        self._client.seek(_place(name), offset)

    @_told
    def seek_to_oldest(self, name: str) -> None:
        """Go on at the oldest message that there is by then."""
        self._client.seek_to_beginning(_place(name))

    @_told
    def position(self, name: str) -> int:
        """The next message to be polled."""
        return self._client.position(_place(name), timeout_ms=ANSWER_MS) or 0

    def end_seen(self, name: str) -> int | None:
        """The end of a partition, as the last fetch told; None before one."""
        end: int | None = self._client.highwater(_place(name))
        return end

    @_told
    def oldest(self, names: Collection[str]) -> Offsets:
        """The first message that there is of each."""
        return _named(self._client.beginning_offsets([_place(name) for name in names], timeout_ms=ANSWER_MS))

    @_told
    def ends(self, names: Collection[str], timeout_ms: int = ANSWER_MS) -> Offsets:
        """The end of each, as the broker tells when asked."""
        return _named(self._client.end_offsets([_place(name) for name in names], timeout_ms=timeout_ms))

    @_told
    def committed(self, name: str) -> tuple[int, str] | None:
        """What the group committed last, and which member of it."""
        noted = self._client.committed(_place(name), metadata=True, timeout_ms=ANSWER_MS)
        return (noted.offset, noted.metadata or "") if noted else None

    @_told
    def commit(self, offsets: Offsets, member: str) -> None:
        """Remember them for the group."""
        self._client.commit(_noted(offsets, member), timeout_ms=ANSWER_MS)

    async def commit_leaving(self, offsets: Offsets, member: str) -> None:
        """``commit`` for ``Owner.revoked``."""
        try:
            await self._client.commit_async(_noted(offsets, member))
        except KafkaError as error:
            raise _ours(self.topic, error) from error

    def close(self) -> None:
        """Leave the group, without a commit.  Safe to call twice."""
        try:
            self._client.close(autocommit=False, timeout_ms=ANSWER_MS)
        except KafkaError as error:
            log.warning("leaving %s: %r", self.topic, error)


class RawClient:
    """kafka-python on ``<prefix>.traces`` with nothing of ours around it: what a measurement is compared with."""

    def __init__(self, brokers: Sequence[str], settings: Kafka) -> None:
        self._topic = topic(settings, TRACES)
        self._producer = _connected(_Producer, brokers, settings, **producing(settings))
        self._consumer = _connected(KafkaConsumer, brokers, settings, **consuming(settings))
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


class _Patient(KafkaNetClient):  # type: ignore[misc]
    """Waits for a broker that has yet to answer; whatever happens on a connection ends the wait.

    The producer's thread takes this for milliseconds, but is told seconds, or 0 of a connection whose request is in
    flight.  Until the answer it would spin, and so take Python's lock from the thread that makes tokens.
    """

    def connection_delay(self, node_id: int) -> float:
        return max(_PATIENCE_MS, 1000 * float(super().connection_delay(node_id)))


class _Sockets(KafkaNetSocket):  # type: ignore[misc]
    """The client picks this by ``proxy_url``, which is how it lets one make its sockets; no proxy is in the way."""

    SCHEMES = ("eager",)

    def socket(self, family: int, sock_type: int, proto: int) -> socket.socket:
        return _EagerSocket(family, sock_type, proto)


class _EagerSocket(socket.socket):
    """Receives more than is asked for: the client asks for 4 KB, and after each lets other threads of Python go first.

    It takes whatever comes, until nothing does.  TLS reads by itself, and is not changed.
    """

    def recv(self, size: int, flags: int = 0) -> bytes:
        return super().recv(max(size, _RECEIVE_BYTES), flags)


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._owner.revoked(_names(revoked))

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._owner.assigned(_names(assigned))

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        self._owner.lost(_names(lost))


def _connected(
    kind: Callable[..., Any],
    brokers: Sequence[str],
    settings: Kafka,
    network: type[KafkaNetClient] = KafkaNetClient,
    **more: Any,
) -> Any:
    """A client with the settings that all of them share.  Raises StreamUnavailable, SettingsError."""
    options = connecting(brokers, settings)
    _knock(brokers)
    made: list[KafkaNetClient] = []

    def keep(**given: Any) -> KafkaNetClient:
        made.append(network(**given))
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


def _ours(what: str, error: Exception) -> TraceError:
    if isinstance(error, _REFUSALS):
        kind: type[TraceError] = TraceError
    else:
        kind = NoAnswer if isinstance(error, KafkaError) and error.retriable else StreamUnavailable
    return kind(f"{what}: {error!r}")


def _place(name: str) -> TopicPartition:
    return TopicPartition(*partition_of(name))


def _names(places: Iterable[TopicPartition]) -> set[str]:
    return {partition_name(*place) for place in places}


def _named(offsets: dict[TopicPartition, int]) -> Offsets:
    return {partition_name(*place): offset for place, offset in offsets.items()}


def _noted(offsets: Offsets, member: str) -> dict[TopicPartition, OffsetAndMetadata]:
    return {_place(name): OffsetAndMetadata(offset, member, -1) for name, offset in offsets.items()}
