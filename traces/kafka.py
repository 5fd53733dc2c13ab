"""The stream on Kafka: what is sent.  ``kafka_source`` and ``kafka_reader`` read.

Delivery: at least once, and the chunks of a trace in order.  What arrives twice is recognised by its trace id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from livedraft.contracts.errors import StreamUnavailable, TraceError
from livedraft.contracts.settings import Kafka
from livedraft.traces.kafka_client import Message, Producer, ensure_topics
from livedraft.traces.kafka_settings import ANSWER_MS, DEAD, TRACES
from livedraft.traces.parcel import Parcel

log = logging.getLogger(__name__)


class KafkaSender:
    """``Sender`` to ``<prefix>.<name>``.  Raises StreamUnavailable where there is no broker to be had."""

    def __init__(self, brokers: Sequence[str], settings: Kafka, name: str = TRACES) -> None:
        if settings.create_topics:
            ensure_topics(brokers, settings)
        self._producer = Producer(brokers, settings, name)
        try:
            self._producer.find_topic()
        except StreamUnavailable:
            self.close(0.0)
            raise

    def send(self, parcel: Parcel, done: Callable[[Exception | None], None]) -> None:
        """As ``Sender.send``."""
        acknowledgements = _Acknowledgements(len(parcel.messages), done)
        for number, message in enumerate(parcel.messages):
            try:
                self._producer.send(parcel.key, message, parcel.headers, acknowledgements.add)
            except TraceError as error:
                if number == 0 and isinstance(error, StreamUnavailable):
                    raise
                acknowledgements.add(error)
                return

    def close(self, timeout: float) -> None:
        """As ``Sender.close``."""
        self._producer.close(timeout)


class _Acknowledgements:
    """Counts the messages of a parcel, which is done with the last of them or with the first error."""

    def __init__(self, count: int, done: Callable[[Exception | None], None]) -> None:
        self._left = count
        self._done = done

    def add(self, error: Exception | None) -> None:
        """One message."""
        if self._left > 0:
            self._left = 0 if error else self._left - 1
            if self._left == 0:
                self._done(error)


class DeadLetters:
    """Copies what could not be read to ``<prefix>.dead``, with the reason and where it was in its headers."""

    def __init__(self, brokers: Sequence[str], settings: Kafka) -> None:
        self._brokers, self._settings = brokers, settings
        self._producer: Producer | None = None

    def bury(self, message: Message, reason: str) -> None:
        """Queue a copy; a broker that does not take it costs a warning."""
        place = {"reason": reason, "topic": message.topic, "partition": message.partition, "offset": message.offset}
        headers = [*message.headers, *((name, str(value).encode()) for name, value in place.items())]
        try:
            if self._producer is None:
                self._producer = Producer(self._brokers, self._settings, DEAD)
            self._producer.send(message.key, message.value, headers, self._sent)
        except TraceError as error:
            self._sent(error)

    def flush(self) -> None:
        """Wait, for seconds at most, until the broker has all copies."""
        if self._producer is not None:
            try:
                self._producer.flush(ANSWER_MS / 1000)
            except TraceError as error:
                self._sent(error)

    def close(self) -> None:
        """Send what is queued."""
        if self._producer is not None:
            self._producer.close(1.0)

    def _sent(self, error: Exception | None) -> None:
        if error is not None:
            log.warning("a dead letter was not copied: %s", error)
