"""The stream on Kafka as a group reads it, whose members, or the ranks of its one member, share its partitions."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError
from kafka.structs import MemberState, OffsetAndMetadata
from livedraft.contracts.errors import SettingsError, StreamUnavailable
from livedraft.contracts.messages import DeadLetter, Delivery, Offsets
from livedraft.contracts.settings import Kafka
from livedraft.traces.chunks import Assembler
from livedraft.traces.kafka import DeadLetters, client, ensure_topics
from livedraft.traces.kafka_reader import LOOK_BACK, items
from livedraft.traces.kafka_settings import (
    ANSWER_MS,
    TRACES,
    consuming,
    first_offset,
    partition_name,
    partition_of,
    sharing,
    topic,
)

log = logging.getLogger(__name__)

#: Milliseconds for a question that the trainer's loop asks, and seconds before one that got no answer is asked again.
_LAG_MS, _ASK_AGAIN_S = 1000, 10.0
#: Longest wait in one go, and for a join in one poll.
_TICK_S, _JOIN_S = 0.2, 6.0


class KafkaSource:
    """``TraceSource`` of ``<prefix>.traces`` for a consumer group, whose members share the partitions.

    A partition that comes to this consumer, at the start or from another one, is read from

    - the offset last given to ``seek`` for it, unless another member of the group has committed a later one since;
    - without one, and when it returns after it was handed over, where the group has committed;
    - else, or where the broker no longer has that, the oldest record.

    Before a partition leaves, the action given to ``on_release`` runs: what it commits is where the next owner begins.

    With a ``share`` (rank, ranks) this is one of so many sources of a reader that is all of the group.  Each has every
    so-manieth partition as long as it lives, and of a partition that was sought the offset given to ``seek`` holds.

    A trace has the offset of its last chunk.  Raises StreamUnavailable where there is no broker to be had.
    """

    def __init__(
        self, brokers: Sequence[str], settings: Kafka, group: str, share: tuple[int, int] | None = None
    ) -> None:
        if settings.create_topics:
            ensure_topics(brokers, settings)
        self._brokers, self._settings = brokers, settings
        self._topic = topic(settings, TRACES)
        self._member = settings.member or socket.gethostname()
        self._fixed = share is not None
        self._consumer = client(
            KafkaConsumer,
            brokers,
            settings,
            partition_assignment_strategy=(CooperativeStickyAssignor,),
            **consuming(settings),
            **sharing(settings, group),
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
        if share is None:
            self._consumer.subscribe([self._topic], listener=_Listener(self))
        else:
            self._take(*share)

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
        found: list[Delivery] = []
        while not found:
            left = max(0.0, deadline - time.monotonic())
            fetched: dict[TopicPartition, list[ConsumerRecord]] = {}  # kept whatever fails after it
            try:
                fetched = self._consumer.poll(timeout_ms=min(left, _TICK_S) * 1000, max_records=limit)
                if not fetched and not self._fixed:
                    fetched = self._join(limit)
                self._begin_gained()
                self._leave_the_beyond()
            except KafkaError as error:
                if not error.retriable:
                    raise StreamUnavailable(f"{self._topic}: {error!r}") from error
            for place, records in fetched.items():
                found += self._read(place, records)
            if not left:
                break
        return found

    def _take(self, rank: int, ranks: int) -> None:
        try:
            places = self._all_partitions()
            if len(places) < ranks:
                found = f"{self._topic} has {len(places)} partitions"
                raise SettingsError(f"{found}, expected at least one for each of {ranks} ranks")
            self._consumer.assign(places[rank::ranks])
        except (KafkaError, SettingsError) as error:
            self.close()
            if isinstance(error, KafkaError):
                raise StreamUnavailable(f"{self._topic}: {error!r}") from error
            raise
        self.assigned(set(places[rank::ranks]))

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
                self._consumer.commit(noted, timeout_ms=ANSWER_MS)
        except KafkaError as error:
            log.warning("offsets are not committed for now: %r", error)

    def committed(self) -> Offsets:
        """What this group committed last.  Raises StreamUnavailable."""
        try:
            places = self._all_partitions()
            found = {place: self._consumer.committed(place, timeout_ms=ANSWER_MS) for place in places}
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
            self._consumer.close(autocommit=False, timeout_ms=ANSWER_MS)
        except KafkaError as error:
            log.warning("leaving the group: %r", error)
        if self._letters is not None:
            self._letters.close()

    def _read(self, place: TopicPartition, records: Sequence[ConsumerRecord]) -> list[Delivery]:
        if records[0].offset < self._fetched_from[place]:  # the client went back by itself
            self._start_over(place)
        name, found = partition_name(*place), list[Delivery]()
        for record, item in items(self._assembler(place), records):
            if record.offset < self._next[place]:  # only looked back at
                continue
            if isinstance(item, DeadLetter):
                if self._letters is not None:
                    self._letters.bury(record, item.reason)
            else:
                self._last_at = item.finished_at
            found.append(Delivery(partition=name, offset=record.offset, item=item))
        self._next[place] = max(self._next[place], records[-1].offset + 1)
        return found

    def _assembler(self, place: TopicPartition) -> Assembler:
        if (found := self._assemblers.get(place)) is None:
            found = self._assemblers[place] = Assembler()
        return found

    def _begin_gained(self) -> None:
        """Find out where to begin with the partitions that came; an answer that does not come is asked for again."""
        for place in sorted(self._gained & self._consumer.assignment()):
            noted = self._consumer.committed(place, metadata=True, timeout_ms=ANSWER_MS)
            first = first_offset(
                self._next.get(place),
                noted.offset if noted else None,
                by_other=bool(noted and noted.metadata and noted.metadata != self._member) and not self._fixed,
            )
            self._forget(place)
            self._next[place] = first
            self._fetched_from[place] = max(0, first - LOOK_BACK)
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


def _place(name: str) -> TopicPartition:
    return TopicPartition(*partition_of(name))
