"""The stream on Kafka as one reads it who only looks, and how messages become items."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import KafkaError
from livedraft.contracts.errors import StreamUnavailable, TraceError
from livedraft.contracts.messages import DeadLetter, Delivery, Offsets, Trace
from livedraft.contracts.settings import Kafka
from livedraft.traces.chunks import Assembler
from livedraft.traces.codec import decode_all
from livedraft.traces.kafka import client
from livedraft.traces.kafka_settings import ANSWER_MS, TRACES, consuming, partition_name, partition_of, topic

#: Messages read again before the first that is wanted, because a trace of another producer may have begun there.
LOOK_BACK = 64
_HEAD_BYTES = 64


class TopicReader:
    """Reads ``<prefix>.traces`` without joining a group, from any offset on.  Raises StreamUnavailable."""

    def __init__(self, brokers: Sequence[str], settings: Kafka) -> None:
        self._topic = topic(settings, TRACES)
        self._consumer = client(KafkaConsumer, brokers, settings, **consuming(settings))

    def bounds(self) -> dict[str, tuple[int, int]]:
        """Partition -> its oldest offset, and that of the next record; nothing where there is no such topic."""
        try:
            places = [TopicPartition(self._topic, n) for n in self._consumer.partitions_for_topic(self._topic)]
            if not places:
                return {}
            oldest = self._consumer.beginning_offsets(places, timeout_ms=ANSWER_MS)
            ends = self._consumer.end_offsets(places, timeout_ms=ANSWER_MS)
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
            for record, item in items(assemblers[name], records):
                if record.offset >= start[name]:
                    yield Delivery(partition=name, offset=record.offset, item=item)

    def messages(self, name: str, first: int) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each message of a partition to its end, some from before ``first`` included."""
        for _, records in self._records({name: first}, follow=False):
            for record in records:
                yield record.offset, record.value or b""

    def _records(self, start: Offsets, follow: bool) -> Iterator[tuple[TopicPartition, list[ConsumerRecord]]]:
        first = {TopicPartition(*partition_of(name)): max(0, offset - LOOK_BACK) for name, offset in start.items()}
        heard = time.monotonic()
        try:
            self._consumer.assign(list(first))
            for place, offset in first.items():
                self._consumer.seek(place, offset)
            while follow or not all(map(self._at_end, first)):
                fetched = self._consumer.poll(timeout_ms=200)
                if fetched or follow:
                    heard = time.monotonic()
                elif time.monotonic() - heard > ANSWER_MS / 1000:
                    raise StreamUnavailable(f"{self._topic}: nothing came for {ANSWER_MS / 1000:g} seconds")
                yield from fetched.items()
        except KafkaError as error:
            raise StreamUnavailable(f"{self._topic}: {error!r}") from error

    def close(self) -> None:
        """Safe to call twice."""
        self._consumer.close(timeout_ms=ANSWER_MS)

    def _at_end(self, place: TopicPartition) -> bool:
        end = self._consumer.highwater(place)
        return end is not None and (self._consumer.position(place, timeout_ms=ANSWER_MS) or 0) >= end


def items(
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
