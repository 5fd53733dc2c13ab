"""The stream on Kafka as one reads it who only looks, and how messages become items."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from livedraft.contracts.errors import StreamUnavailable, TraceError
from livedraft.contracts.messages import DeadLetter, Delivery, Offsets, Trace
from livedraft.contracts.settings import Kafka
from livedraft.traces.chunks import Assembler
from livedraft.traces.codec import decode_all
from livedraft.traces.kafka_client import Consumer, Message
from livedraft.traces.kafka_settings import ANSWER_MS

#: Messages read again before the first that is wanted, because a trace of another producer may have begun there.
LOOK_BACK = 64
_TICK_S = 0.2
_HEAD_BYTES = 64


class TopicReader:
    """Reads ``<prefix>.traces`` without joining a group, from any offset on.  Raises StreamUnavailable."""

    def __init__(self, brokers: Sequence[str], settings: Kafka) -> None:
        self._consumer = Consumer(brokers, settings)

    def bounds(self) -> dict[str, tuple[int, int]]:
        """Partition -> its oldest offset, and that of the next record; nothing where there is no such topic."""
        names = self._consumer.partitions()
        if not names:
            return {}
        oldest, ends = self._consumer.oldest(names), self._consumer.ends(names)
        self._consumer.assign(names)
        for name in names:
            self._consumer.seek(name, ends[name])
        for _ in range(5):  # not every broker counts the last batch right when asked; what a fetch says is so
            self._consumer.poll(_TICK_S)
            if all(self._consumer.end_seen(name) is not None for name in names):
                break
        return {name: (oldest[name], max(ends[name], self._consumer.end_seen(name) or 0)) for name in names}

    def read(self, start: Offsets, *, follow: bool = False) -> Iterator[Delivery]:
        """Items of the partitions in ``start`` that end at or after the offset there.

        To the end, as it is when one comes to it; for ever when ``follow``.
        """
        assemblers = {name: Assembler() for name in start}
        for name, messages in self._messages(start, follow):
            for message, item in items(assemblers[name], messages):
                if message.offset >= start[name]:
                    yield Delivery(partition=name, offset=message.offset, item=item)

    def messages(self, name: str, first: int) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each message of a partition to its end, some from before ``first`` included."""
        for _, messages in self._messages({name: first}, follow=False):
            for message in messages:
                yield message.offset, message.value or b""

    def _messages(self, start: Offsets, follow: bool) -> Iterator[tuple[str, list[Message]]]:
        heard = time.monotonic()
        self._consumer.assign(start)
        for name, offset in start.items():
            self._consumer.seek(name, max(0, offset - LOOK_BACK))
        while follow or not all(map(self._at_end, start)):
            fetched = self._consumer.poll(_TICK_S)
            if fetched or follow:
                heard = time.monotonic()
            elif time.monotonic() - heard > ANSWER_MS / 1000:
                raise StreamUnavailable(f"{self._consumer.topic}: nothing came for {ANSWER_MS / 1000:g} seconds")
            yield from fetched.items()

    def close(self) -> None:
        """Safe to call twice."""
        self._consumer.close()

    def _at_end(self, name: str) -> bool:
        end = self._consumer.end_seen(name)
        return end is not None and self._consumer.position(name) >= end


def items(assembler: Assembler, messages: Sequence[Message]) -> Iterator[tuple[Message, Trace | DeadLetter]]:
    """Each message that is an item or completes one, with it."""
    whole: list[bytes | TraceError] = []
    ends: list[Message] = []
    for message in messages:
        record: bytes | TraceError | None
        try:
            record = assembler.add(message.value or b"")
        except TraceError as error:
            record = error
        if record is not None:
            whole.append(record)
            ends.append(message)
    for end, found in zip(ends, decode_all(whole), strict=True):
        if isinstance(found, TraceError):
            head = (end.value or b"")[:_HEAD_BYTES]
            yield end, DeadLetter(offset=end.offset, reason=str(found), head=head)
        else:
            yield end, found
