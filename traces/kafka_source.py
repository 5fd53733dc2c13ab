"""The stream on Kafka as a group reads it, whose members, or the ranks of its one member, share its partitions."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence

from livedraft.contracts.errors import SettingsError, StreamUnavailable, TraceError
from livedraft.contracts.messages import DeadLetter, Delivery, Offsets
from livedraft.contracts.settings import Kafka
from livedraft.traces.chunks import Assembler
from livedraft.traces.kafka import DeadLetters
from livedraft.traces.kafka_client import Consumer, Message, NoAnswer, ensure_topics
from livedraft.traces.kafka_reader import LOOK_BACK, items
from livedraft.traces.kafka_settings import first_offset, partition_of

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
        self._member = settings.member or socket.gethostname()
        self._fixed = share is not None
        self._consumer = Consumer(brokers, settings, group)
        self._letters = DeadLetters(brokers, settings) if group == settings.dead_letter_group else None
        #: Where to begin, and then the next record not yet polled.
        self._next: Offsets = {}
        #: The first record asked for, at or before the one to begin with.
        self._fetched_from: Offsets = {}
        self._assemblers: dict[str, Assembler] = {}
        self._incomplete = 0
        #: Partitions that came and have no position yet, and those about to leave.
        self._gained: set[str] = set()
        self._leaving: set[str] = set()
        self._save: Callable[[], None] = lambda: None
        self._committing: Offsets = {}
        #: Ends of partitions when the broker was last asked, and when to ask it again after it did not answer.
        self._ends: Offsets = {}
        self._begun: Offsets = {}
        self._ask_at = 0.0
        #: When to wait for a join again after one that took too long.
        self._join_at = 0.0
        #: Unix seconds at which the request of the trace polled last ended.
        self._last_at = 0.0
        if share is None:
            self._consumer.subscribe(self)
        else:
            self._take(*share)

    @property
    def incomplete(self) -> int:
        """Traces given up because not all of their chunks came."""
        return self._incomplete + sum(assembler.incomplete for assembler in self._assemblers.values())

    @property
    def partitions(self) -> set[str]:
        """Those this consumer reads now."""
        return self._consumer.assignment()

    def on_release(self, save: Callable[[], None]) -> None:
        """As ``TraceSource.on_release``.  ``save`` runs while ``poll`` waits, on the client's thread."""
        self._save = save

    def seek(self, offsets: Offsets) -> None:
        """Continue from ``offsets``; partitions without one begin where the group has committed."""
        for name in offsets:
            partition_of(name)
        self._next = dict(offsets)
        self._gained |= self._consumer.assignment()
        self._consumer.pause(self._gained)

    def poll(self, timeout: float = 0.0, limit: int = 256) -> list[Delivery]:
        """Up to ``limit`` items, waiting at most ``timeout`` seconds for the first; longer to join and to hand over.

        Raises StreamUnavailable for a broker that refuses us; one that is away has nothing new.
        """
        deadline = time.monotonic() + timeout
        found: list[Delivery] = []
        while not found:
            left = max(0.0, deadline - time.monotonic())
            fetched: dict[str, list[Message]] = {}  # kept whatever fails after it
            with contextlib.suppress(NoAnswer):
                fetched = self._consumer.poll(min(left, _TICK_S), limit)
                if not fetched and not self._fixed:
                    fetched = self._join(limit)
                self._begin_gained()
                self._leave_the_beyond()
            for name, messages in fetched.items():
                found += self._read(name, messages)
            if not left:
                break
        return found

    def _take(self, rank: int, ranks: int) -> None:
        try:
            names = self._consumer.partitions()
            if len(names) < ranks:
                found = f"{self._consumer.topic} has {len(names)} partitions"
                raise SettingsError(f"{found}, expected at least one for each of {ranks} ranks")
            self._consumer.assign(names[rank::ranks])
        except (StreamUnavailable, SettingsError):
            self.close()
            raise
        self.assigned(set(names[rank::ranks]))

    def _join(self, limit: int) -> dict[str, list[Message]]:
        """Stay with the client until it has joined: a join that ends between two polls is thrown away, and begun anew.

        One that takes too long, or a broker that is away, is left alone for a while.
        """
        fetched: dict[str, list[Message]] = {}
        now = time.monotonic()
        until = now + _JOIN_S if now >= self._join_at else 0.0
        while not fetched and not self._consumer.has_joined:
            if time.monotonic() >= until:
                self._join_at = max(self._join_at, until + _ASK_AGAIN_S)
                break
            fetched = self._consumer.poll(_TICK_S, limit)
        return fetched

    def commit(self, offsets: Offsets) -> None:
        """Remember ``offsets`` of our partitions for the group.

        An outage of the broker delays this until the next time, with a warning: what counts for this consumer are
        the offsets that it gives to ``seek``.
        """
        ours = self._consumer.assignment() | self._leaving
        offsets = {name: offset for name, offset in offsets.items() if name in ours}
        if self._leaving:  # the listener sends them
            self._committing = offsets
            return
        if self._letters is not None:
            self._letters.flush()
        try:
            if offsets:
                self._consumer.commit(offsets, self._member)
        except TraceError as error:
            log.warning("offsets are not committed for now: %s", error)

    def committed(self) -> Offsets:
        """What this group committed last.  Raises StreamUnavailable."""
        noted = {name: self._consumer.committed(name) for name in self._consumer.partitions()}
        return {name: found[0] for name, found in noted.items() if found is not None}

    def lag(self) -> int:
        """Messages of our partitions written but not yet polled; before we have any, all not yet committed.

        By what the broker said last while it is away.  Raises StreamUnavailable when it never answered.
        """
        ours = self._consumer.assignment()
        if time.monotonic() >= self._ask_at:
            try:
                ends = self._consumer.ends(ours or self._consumer.partitions(), _LAG_MS)
                self._begun = {} if ours else self.committed()
                self._ends = ends
            except StreamUnavailable:
                self._ask_at = time.monotonic() + _ASK_AGAIN_S
                if not self._ends:
                    raise
        total = 0
        for name, end in self._ends.items():
            if name in ours:  # a fetch may have told of more
                end = max(end, self._consumer.end_seen(name) or 0)
            total += max(0, end - self._next.get(name, self._begun.get(name, 0)))
        return total

    def age_s(self) -> float:
        """Seconds since the request of the trace polled last ended; 0 before there is one."""
        return max(0.0, time.time() - self._last_at) if self._last_at else 0.0

    def close(self) -> None:
        """Leave the group.  Safe to call twice."""
        self._save = lambda: None  # what is used and not yet saved is for the next owner
        self._consumer.close()
        if self._letters is not None:
            self._letters.close()

    def _read(self, name: str, messages: Sequence[Message]) -> list[Delivery]:
        if messages[0].offset < self._fetched_from[name]:  # the client went back by itself
            self._start_over(name)
        found = list[Delivery]()
        for message, item in items(self._assembler(name), messages):
            if message.offset < self._next[name]:  # only looked back at
                continue
            if isinstance(item, DeadLetter):
                if self._letters is not None:
                    self._letters.bury(message, item.reason)
            else:
                self._last_at = item.finished_at
            found.append(Delivery(partition=name, offset=message.offset, item=item))
        self._next[name] = max(self._next[name], messages[-1].offset + 1)
        return found

    def _assembler(self, name: str) -> Assembler:
        if (found := self._assemblers.get(name)) is None:
            found = self._assemblers[name] = Assembler()
        return found

    def _begin_gained(self) -> None:
        """Find out where to begin with the partitions that came; an answer that does not come is asked for again."""
        for name in sorted(self._gained & self._consumer.assignment()):
            committed, member = self._consumer.committed(name) or (None, "")
            by_other = bool(member) and member != self._member and not self._fixed
            first = first_offset(self._next.get(name), committed, by_other=by_other)
            self._forget(name)
            self._next[name] = first
            self._fetched_from[name] = max(0, first - LOOK_BACK)
            self._consumer.seek(name, self._fetched_from[name])
            self._consumer.resume(name)
            self._gained.discard(name)

    def _leave_the_beyond(self) -> None:
        """A topic made anew ends before our offset: Kafka refuses that, and the client goes back; others just wait."""
        for name in self._consumer.assignment() - self._gained:
            end = self._consumer.end_seen(name)
            if end is not None and end < self._fetched_from[name]:
                self._start_over(name)
                self._consumer.seek_to_oldest(name)

    def _start_over(self, name: str) -> None:
        log.warning("%s no longer has offset %d: going on at its oldest record", name, self._next[name])
        self._next[name] = self._fetched_from[name] = 0
        self._forget(name)

    def _forget(self, name: str) -> None:
        if old := self._assemblers.pop(name, None):
            self._incomplete += old.incomplete

    async def revoked(self, names: set[str]) -> None:
        """As ``Owner.revoked``: save, commit, and only then let go."""
        self._leaving, self._committing = set(names), {}
        try:
            self._save()
            if self._committing:
                await self._consumer.commit_leaving(self._committing, self._member)
        except StreamUnavailable as error:
            log.warning("offsets are not committed, the next owner will repeat some: %s", error)
        finally:
            self._leaving = set()
            self.lost(names)
            for name in names:
                self._next.pop(name, None)

    def lost(self, names: set[str]) -> None:
        """As ``Owner.lost``: should they come back, we know what we have used."""
        self._gained -= names
        for name in names:
            self._forget(name)

    def assigned(self, names: set[str]) -> None:
        """As ``Owner.assigned``: held back until ``poll`` has found out where to begin."""
        self._gained |= names
        self._consumer.pause(names)
