"""The stream on Kafka: the only file that knows the client (kafka-python).

Delivery: the producer runs without idempotence, because kafka-python's never sends again once a batch has outlived
its timeout, and with one request in flight per connection, so that a retry does not reorder the chunks of a trace.
What arrives twice is recognised by its trace id.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.codec import has_zstd
from kafka.consumer.fetcher import ConsumerRecord
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
from kafka.structs import MemberState, OffsetAndMetadata
from livedraft.contracts.errors import SettingsError, StreamUnavailable, TraceError
from livedraft.contracts.messages import DeadLetter, Delivery, Offsets, Trace
from livedraft.contracts.settings import Kafka
from livedraft.traces.chunks import Assembler
from livedraft.traces.codec import decode_all
from livedraft.traces.parcel import Parcel

log = logging.getLogger(__name__)
logging.getLogger("kafka").setLevel(logging.ERROR)  # it tells of every connection, retry and rebalance

TRACES, DRAFTS, SWAPS, DEAD = "traces", "drafts", "swaps", "dead"

#: Milliseconds for finding the broker, and for one question to it.
_CONNECT_MS, _ANSWER_MS = 5000, 5000
#: Milliseconds for a question that the trainer's loop asks, and seconds before one that got no answer is asked again.
_LAG_MS, _ASK_AGAIN_S = 1000, 10.0
#: Messages read again before the first that is wanted, because a trace of another producer may have begun there.
_LOOK_BACK = 64
_HEAD_BYTES = 64
#: Fetched at once, from all partitions: what stays in a processor's cache is parsed and decoded half as fast again.
#: A larger message still comes.
_FETCH_BYTES = 2 << 20
#: Longest wait in one go, and for a join in one poll.
_TICK_S, _JOIN_S = 0.2, 6.0
#: What sending again does not help.
_REFUSALS = (MessageSizeTooLargeError, RecordListTooLargeError, InvalidRecordError, InvalidTopicError)


def topic(settings: Kafka, name: str) -> str:
    """The full name of a topic."""
    return f"{settings.prefix}.{name}"


def partition_name(topic: str, partition: int) -> str:
    """How a partition is called in ``Offsets``."""
    return f"{topic}/{partition}"


def check(settings: Kafka) -> None:
    """Raises SettingsError for what would only fail at the first connection."""
    for field in ("tls_ca", "tls_certificate", "tls_key"):
        path = getattr(settings, field)
        if path is not None and not Path(path).is_file():
            raise SettingsError(f"kafka.{field} is {path!r}, expected a PEM file")
    if settings.security.startswith("sasl"):
        _password(settings)
    if settings.compression == "zstd" and not has_zstd():
        raise SettingsError("kafka.compression is 'zstd', which needs the package zstandard")


def ensure_topics(brokers: Sequence[str], settings: Kafka) -> None:
    """Create the topics that do not exist.  Raises StreamUnavailable, SettingsError."""
    bounded = {
        "retention.ms": str(int(settings.retention_hours * 3_600_000)),
        "retention.bytes": str(settings.retention_bytes),
        "max.message.bytes": str(settings.max_message_bytes),
    }
    kept = {"retention.ms": "-1", "max.message.bytes": str(settings.max_message_bytes)}
    wanted = {TRACES: (settings.partitions, bounded), DEAD: (1, bounded), DRAFTS: (1, kept), SWAPS: (1, kept)}
    admin = _client(KafkaAdminClient, brokers, settings)
    try:
        existing = set(admin.list_topics())
        for name, (partitions, configs) in wanted.items():
            if topic(settings, name) not in existing:
                spec = {"num_partitions": partitions, "replication_factor": settings.replication, "configs": configs}
                try:
                    admin.create_topics({topic(settings, name): spec}, timeout_ms=_ANSWER_MS)
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


class KafkaSource:
    """``TraceSource`` of ``<prefix>.traces`` for a consumer group, whose members share the partitions.

    A partition that comes to this consumer, at the start or from another one, is read from

    - the offset last given to ``seek`` for it, unless another member of the group has committed a later one since;
    - without one, and when it returns after it was handed over, where the group has committed;
    - else, or where the broker no longer has that, the oldest record.

    Before a partition leaves, the action given to ``on_release`` runs: what it commits is where the next owner begins.
    A trace has the offset of its last chunk.  Raises StreamUnavailable where there is no broker to be had.
    """

    def __init__(self, brokers: Sequence[str], settings: Kafka, group: str) -> None:
        if settings.create_topics:
            ensure_topics(brokers, settings)
        self._brokers, self._settings = brokers, settings
        self._topic = topic(settings, TRACES)
        self._member = settings.member or socket.gethostname()
        self._consumer = _client(
            KafkaConsumer,
            brokers,
            settings,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            partition_assignment_strategy=(CooperativeStickyAssignor,),
            session_timeout_ms=int(settings.session_timeout_s * 1000),
            heartbeat_interval_ms=int(settings.session_timeout_s * 250),
            **_fetching(settings),
        )
        self._letters = DeadLetters(brokers, settings) if group == settings.dead_letter_group else None
        #: Where to begin, and then the next record not yet polled.
        self._next: dict[TopicPartition, int] = {}
        #: The first record asked for, at or before the one to begin with.
        self._fetched_from: dict[TopicPartition, int] = {}
        self._assemblers: dict[TopicPartition, Assembler] = {}
        self._incomplete = 0
        #: Partitions that came and have no position yet, and those about to leave.
        self._gained: set[TopicPartition] = set()
        self._leaving: set[TopicPartition] = set()
        self._save: Callable[[], None] = lambda: None
        self._committing: dict[TopicPartition, OffsetAndMetadata] = {}
        #: Ends of partitions when the broker was last asked, and when to ask it again after it did not answer.
        self._ends: dict[TopicPartition, int] = {}
        self._begun: dict[TopicPartition, int] = {}
        self._ask_at = 0.0
        #: When to wait for a join again after one that took too long.
        self._join_at = 0.0
        #: Unix seconds at which the request of the trace polled last ended.
        self._last_at = 0.0
        self._consumer.subscribe([self._topic], listener=_Listener(self))

    @property
    def incomplete(self) -> int:
        """Traces given up because not all of their chunks came."""
        return self._incomplete + sum(assembler.incomplete for assembler in self._assemblers.values())

    @property
    def partitions(self) -> set[str]:
        """Those this consumer reads now."""
        return {partition_name(*place) for place in self._consumer.assignment()}

    def on_release(self, save: Callable[[], None]) -> None:
        """As ``TraceSource.on_release``.  ``save`` runs while ``poll`` waits, on the client's thread."""
        self._save = save

    def seek(self, offsets: Offsets) -> None:
        """Continue from ``offsets``; partitions without one begin where the group has committed."""
        self._next = {_place(name): offset for name, offset in offsets.items()}
        self._gained |= self._consumer.assignment()
        self._consumer.pause(*self._gained)

    def poll(self, timeout: float = 0.0, limit: int = 256) -> list[Delivery]:
        """Up to ``limit`` items, waiting at most ``timeout`` seconds for the first; longer to join and to hand over.

        Raises StreamUnavailable for a broker that refuses us; one that is away has nothing new.
        """
        deadline = time.monotonic() + timeout
        items: list[Delivery] = []
        while not items:
            left = max(0.0, deadline - time.monotonic())
            fetched: dict[TopicPartition, list[ConsumerRecord]] = {}  # kept whatever fails after it
            try:
                fetched = self._consumer.poll(timeout_ms=min(left, _TICK_S) * 1000, max_records=limit)
                if not fetched:
                    fetched = self._join(limit)
                self._begin_gained()
                self._leave_the_beyond()
            except KafkaError as error:
                if not error.retriable:
                    raise StreamUnavailable(f"{self._topic}: {error!r}") from error
            for place, records in fetched.items():
                items += self._read(place, records)
            if not left:
                break
        return items

    def _join(self, limit: int) -> dict[TopicPartition, list[ConsumerRecord]]:
        """Stay with the client until it has joined: a join that ends between two polls is thrown away, and begun anew.

        One that takes too long, or a broker that is away, is left alone for a while.
        """
        fetched: dict[TopicPartition, list[ConsumerRecord]] = {}
        now = time.monotonic()
        until = now + _JOIN_S if now >= self._join_at else 0.0
        while not fetched and self._consumer.group_metadata().state != MemberState.STABLE:
            if time.monotonic() >= until:
                self._join_at = max(self._join_at, until + _ASK_AGAIN_S)
                break
            fetched = self._consumer.poll(timeout_ms=_TICK_S * 1000, max_records=limit)
        return fetched

    def commit(self, offsets: Offsets) -> None:
        """Remember ``offsets`` of our partitions for the group.

        An outage of the broker delays this until the next time, with a warning: what counts for this consumer are
        the offsets that it gives to ``seek``.
        """
        ours = self._consumer.assignment() | self._leaving
        places = {_place(name): offset for name, offset in offsets.items()}
        noted = {p: OffsetAndMetadata(offset, self._member, -1) for p, offset in places.items() if p in ours}
        if self._leaving:  # the listener sends them
            self._committing = noted
            return
        if self._letters is not None:
            self._letters.flush()
        try:
            if noted:
                self._consumer.commit(noted, timeout_ms=_ANSWER_MS)
        except KafkaError as error:
            log.warning("offsets are not committed for now: %r", error)

    def committed(self) -> Offsets:
        """What this group committed last.  Raises StreamUnavailable."""
        try:
            places = self._all_partitions()
            found = {place: self._consumer.committed(place, timeout_ms=_ANSWER_MS) for place in places}
        except KafkaError as error:
            raise StreamUnavailable(f"{self._topic}: {error!r}") from error
        return {partition_name(*place): offset for place, offset in found.items() if offset is not None}

    def lag(self) -> int:
        """Messages of our partitions written but not yet polled; before we have any, all not yet committed.

        By what the broker said last while it is away.  Raises StreamUnavailable when it never answered.
        """
        ours = self._consumer.assignment()
        if time.monotonic() >= self._ask_at:
            try:
                ends = self._consumer.end_offsets(list(ours) or self._all_partitions(), timeout_ms=_LAG_MS)
                self._begun = {} if ours else {_place(name): offset for name, offset in self.committed().items()}
                self._ends = ends
            except (KafkaError, StreamUnavailable) as error:
                self._ask_at = time.monotonic() + _ASK_AGAIN_S
                if not self._ends:
                    raise StreamUnavailable(f"{self._topic}: {error!r}") from error
        total = 0
        for place, end in self._ends.items():
            if place in ours:  # a fetch may have told of more
                end = max(end, self._consumer.highwater(place) or 0)
            total += max(0, end - self._next.get(place, self._begun.get(place, 0)))
        return total

    def age_s(self) -> float:
        """Seconds since the request of the trace polled last ended; 0 before there is one."""
        return max(0.0, time.time() - self._last_at) if self._last_at else 0.0

    def close(self) -> None:
        """Leave the group.  Safe to call twice."""
        self._save = lambda: None  # what is used and not yet saved is for the next owner
        try:
            self._consumer.close(autocommit=False, timeout_ms=_ANSWER_MS)
        except KafkaError as error:
            log.warning("leaving the group: %r", error)
        if self._letters is not None:
            self._letters.close()

    def _read(self, place: TopicPartition, records: Sequence[ConsumerRecord]) -> list[Delivery]:
        if records[0].offset < self._fetched_from[place]:  # the client went back by itself
            self._start_over(place)
        name, items = partition_name(*place), list[Delivery]()
        for record, item in _items(self._assembler(place), records):
            if record.offset < self._next[place]:  # only looked back at
                continue
            if isinstance(item, DeadLetter):
                if self._letters is not None:
                    self._letters.bury(record, item.reason)
            else:
                self._last_at = item.finished_at
            items.append(Delivery(partition=name, offset=record.offset, item=item))
        self._next[place] = max(self._next[place], records[-1].offset + 1)
        return items

    def _assembler(self, place: TopicPartition) -> Assembler:
        if (found := self._assemblers.get(place)) is None:
            found = self._assemblers[place] = Assembler()
        return found

    def _begin_gained(self) -> None:
        """Find out where to begin with the partitions that came; an answer that does not come is asked for again."""
        for place in sorted(self._gained & self._consumer.assignment()):
            noted = self._consumer.committed(place, metadata=True, timeout_ms=_ANSWER_MS)
            first = first_offset(
                self._next.get(place),
                noted.offset if noted else None,
                by_other=bool(noted and noted.metadata and noted.metadata != self._member),
            )
            self._forget(place)
            self._next[place] = first
            self._fetched_from[place] = max(0, first - _LOOK_BACK)
            self._consumer.seek(place, self._fetched_from[place])
            self._consumer.resume(place)
            self._gained.discard(place)

    def _leave_the_beyond(self) -> None:
        """A topic made anew ends before our offset: Kafka refuses that, and the client goes back; others just wait."""
        for place in self._consumer.assignment() - self._gained:
            end = self._consumer.highwater(place)
            if end is not None and end < self._fetched_from[place]:
                self._start_over(place)
                self._consumer.seek_to_beginning(place)

    def _start_over(self, place: TopicPartition) -> None:
        log.warning("%s no longer has offset %d: going on at its oldest record", place, self._next[place])
        self._next[place] = self._fetched_from[place] = 0
        self._forget(place)

    def _forget(self, place: TopicPartition) -> None:
        if old := self._assemblers.pop(place, None):
            self._incomplete += old.incomplete

    def _all_partitions(self) -> list[TopicPartition]:
        return [TopicPartition(self._topic, n) for n in sorted(self._consumer.partitions_for_topic(self._topic))]

    async def revoked(self, places: set[TopicPartition]) -> None:
        """The client's thread, ``poll`` waiting: save, commit, and only then let go."""
        self._leaving, self._committing = set(places), {}
        try:
            self._save()
            if self._committing:
                await self._consumer.commit_async(self._committing)
        except KafkaError as error:
            log.warning("offsets are not committed, the next owner will repeat some: %r", error)
        finally:
            self._leaving = set()
            self.lost(places)
            for place in places:
                self._next.pop(place, None)

    def lost(self, places: set[TopicPartition]) -> None:
        """They are no longer ours, and nothing was handed over: should they come back, we know what we have used."""
        self._gained -= places
        for place in places:
            self._forget(place)

    def assigned(self, places: set[TopicPartition]) -> None:
        """Held back until ``poll`` has found out where to begin: here, nothing may wait for the broker."""
        self._gained |= places
        self._consumer.pause(*places)


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, source: KafkaSource) -> None:
        self._source = source

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._source.revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._source.assigned(assigned)

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        self._source.lost(lost)


class TopicReader:
    """Reads ``<prefix>.traces`` without joining a group, from any offset on.  Raises StreamUnavailable."""

    def __init__(self, brokers: Sequence[str], settings: Kafka) -> None:
        self._topic = topic(settings, TRACES)
        self._consumer = _client(
            KafkaConsumer,
            brokers,
            settings,
            auto_offset_reset="earliest",
            **_fetching(settings),
        )

    def bounds(self) -> dict[str, tuple[int, int]]:
        """Partition -> its oldest offset, and that of the next record; nothing where there is no such topic."""
        try:
            places = [TopicPartition(self._topic, n) for n in self._consumer.partitions_for_topic(self._topic)]
            if not places:
                return {}
            oldest = self._consumer.beginning_offsets(places, timeout_ms=_ANSWER_MS)
            ends = self._consumer.end_offsets(places, timeout_ms=_ANSWER_MS)
            self._consumer.assign(places)
            for place in places:
                self._consumer.seek(place, ends[place])
            for _ in range(5):  # not every broker counts the last batch right when asked; what a fetch says is so
                self._consumer.poll(timeout_ms=200)
                if all(self._consumer.highwater(place) is not None for place in places):
                    break
            ends = {place: max(end, self._consumer.highwater(place) or 0) for place, end in ends.items()}
        except KafkaError as error:
            raise StreamUnavailable(f"{self._topic}: {error!r}") from error
        return {partition_name(*place): (oldest[place], ends[place]) for place in sorted(places)}

    def read(self, start: Offsets, *, follow: bool = False) -> Iterator[Delivery]:
        """Items of the partitions in ``start`` that end at or after the offset there.

        To the end, as it is when one comes to it; for ever when ``follow``.
        """
        assemblers = {name: Assembler() for name in start}
        for place, records in self._records(start, follow):
            name = partition_name(*place)
            for record, item in _items(assemblers[name], records):
                if record.offset >= start[name]:
                    yield Delivery(partition=name, offset=record.offset, item=item)

    def messages(self, name: str, first: int) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each message of a partition to its end, some from before ``first`` included."""
        for _, records in self._records({name: first}, follow=False):
            for record in records:
                yield record.offset, record.value or b""

    def _records(self, start: Offsets, follow: bool) -> Iterator[tuple[TopicPartition, list[ConsumerRecord]]]:
        first = {_place(name): max(0, offset - _LOOK_BACK) for name, offset in start.items()}
        heard = time.monotonic()
        try:
            self._consumer.assign(list(first))
            for place, offset in first.items():
                self._consumer.seek(place, offset)
            while follow or not all(map(self._at_end, first)):
                fetched = self._consumer.poll(timeout_ms=200)
                if fetched or follow:
                    heard = time.monotonic()
                elif time.monotonic() - heard > _ANSWER_MS / 1000:
                    raise StreamUnavailable(f"{self._topic}: nothing came for {_ANSWER_MS / 1000:g} seconds")
                yield from fetched.items()
        except KafkaError as error:
            raise StreamUnavailable(f"{self._topic}: {error!r}") from error

    def close(self) -> None:
        """Safe to call twice."""
        self._consumer.close(timeout_ms=_ANSWER_MS)

    def _at_end(self, place: TopicPartition) -> bool:
        end = self._consumer.highwater(place)
        return end is not None and (self._consumer.position(place, timeout_ms=_ANSWER_MS) or 0) >= end


def _items(
    assembler: Assembler, records: Sequence[ConsumerRecord]
) -> Iterator[tuple[ConsumerRecord, Trace | DeadLetter]]:
    """Each record that is an item or completes one, with it."""
    whole: list[bytes | TraceError] = []
    ends: list[ConsumerRecord] = []
    for record in records:
        message: bytes | TraceError | None
        try:
            message = assembler.add(record.value or b"")
        except TraceError as error:
            message = error
        if message is not None:
            whole.append(message)
            ends.append(record)
    for record, found in zip(ends, decode_all(whole), strict=True):
        if isinstance(found, TraceError):
            head = (record.value or b"")[:_HEAD_BYTES]
            yield record, DeadLetter(offset=record.offset, reason=str(found), head=head)
        else:
            yield record, found


def _place(name: str) -> TopicPartition:
    head, separator, number = name.rpartition("/")
    if not separator or not number.isdecimal():
        raise TraceError(f"partition {name!r}: expected topic/number; the offsets are another stream's")
    return TopicPartition(head, int(number))


def first_offset(sought: int | None, committed: int | None, *, by_other: bool) -> int:
    """Where to begin with a partition; ``by_other``: the group's offset was committed by another member than us.

    Our own offsets come from a checkpoint, which is never behind what we committed, unless it was set back on
    purpose.  Another member has committed only after the partition had left us: what it says is newer.
    """
    if sought is None or committed is None:
        return sought or committed or 0
    return max(sought, committed) if by_other else sought


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
                self._producer.flush(_ANSWER_MS / 1000)
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
        self._consumer = _client(KafkaConsumer, brokers, settings, auto_offset_reset="earliest", **_fetching(settings))
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


def _fetching(settings: Kafka) -> dict[str, Any]:
    return {"fetch_max_bytes": _FETCH_BYTES, "max_partition_fetch_bytes": settings.max_message_bytes}


def _producer(brokers: Sequence[str], settings: Kafka) -> Any:
    return _client(
        _Producer,
        brokers,
        settings,
        acks="all",
        enable_idempotence=False,
        max_in_flight_requests_per_connection=1,
        max_request_size=settings.max_message_bytes,
        batch_size=1 << 20,
        linger_ms=settings.linger_ms,
        compression_type=None if settings.compression == "none" else settings.compression,
        delivery_timeout_ms=int(settings.delivery_timeout_s * 1000),
        request_timeout_ms=max(100, min(30_000, int(settings.delivery_timeout_s * 1000) - settings.linger_ms)),
        max_block_ms=_ANSWER_MS,
    )


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


def _client(kind: Callable[..., Any], brokers: Sequence[str], settings: Kafka, **more: Any) -> Any:
    """A connected client with the settings that all of them share.  Raises StreamUnavailable, SettingsError."""
    shared = {
        "bootstrap_servers": list(brokers),
        "client_id": "livedraft",
        "bootstrap_timeout_ms": _CONNECT_MS,
        "reconnect_backoff_max_ms": 1000,
        "security_protocol": settings.security.upper(),
        "ssl_cafile": settings.tls_ca,
        "ssl_certfile": settings.tls_certificate,
        "ssl_keyfile": settings.tls_key,
        "ssl_check_hostname": settings.tls_check_hostname,
    }
    if settings.security.startswith("sasl"):
        shared |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": _password(settings),
        }
    _knock(brokers)
    made: list[KafkaNetClient] = []

    def keep(**given: Any) -> KafkaNetClient:
        made.append(KafkaNetClient(**given))
        return made[-1]

    try:
        return kind(**shared, **more, kafka_client=keep)
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
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_MS / 1000).close()
            return
        except OSError as error:
            refusals.append(f"{broker} ({error})")
    raise StreamUnavailable(f"no broker at {', '.join(refusals)}")


def _password(settings: Kafka) -> str:
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
