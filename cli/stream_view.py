"""A stream as the commands look at it: what each partition holds, and its items from any offset on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from livedraft.cli.republish import spool_messages, trace_start
from livedraft.contracts.errors import BadRequest, NotFound
from livedraft.contracts.messages import Delivery, Offsets
from livedraft.contracts.settings import Settings
from livedraft.traces.replay import replay
from livedraft.traces.segments import usage
from livedraft.traces.source import PARTITION, SpoolSource
from livedraft.traces.urls import KAFKA, broker_addresses, spool_folder

#: Names the reader of a spool; it never commits, so that no consumer's offsets move.
_GROUP = "cli"


class Held(NamedTuple):
    """Records ``oldest`` to ``end - 1``."""

    oldest: int
    end: int


class StreamView(Protocol):
    """A stream to look into; nobody's offsets move."""

    def held(self) -> dict[str, Held]:
        """What each partition holds now."""

    def read(self, start: Offsets, *, follow: bool = False) -> Iterator[Delivery]:
        """Items of the partitions in ``start``, from the one that the record there is part of.

        To what is the end now, or for ever when ``follow``.
        """

    def messages(self, partition: str, first: int) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of each message to the end, from where the trace begins that ``first`` is part of."""


class SpoolView:
    """A spool on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def held(self) -> dict[str, Held]:
        """As ``StreamView.held``."""
        found = usage(self._folder)
        return {PARTITION: Held(found.oldest, found.end)}

    def read(self, start: Offsets, *, follow: bool = False) -> Iterator[Delivery]:
        """As ``StreamView.read``."""
        first = trace_start(self._folder, start[PARTITION])
        with contextlib.closing(SpoolSource(self._folder, _GROUP)) as source:
            yield from replay(source, {PARTITION: first}, follow=follow)

    def messages(self, partition: str, first: int) -> Iterator[tuple[int, bytes]]:
        """As ``StreamView.messages``."""
        yield from spool_messages(self._folder, first)


class TopicView:
    """A topic of a broker, joined only to be looked into."""

    def __init__(self, settings: Settings) -> None:
        self._brokers = broker_addresses(settings.traces.url)
        self._settings = settings.kafka

    def held(self) -> dict[str, Held]:
        """As ``StreamView.held``."""
        from livedraft.traces.kafka_reader import TopicReader

        with contextlib.closing(TopicReader(self._brokers, self._settings)) as reader:
            return {name: Held(*bounds) for name, bounds in reader.bounds().items()}

    def read(self, start: Offsets, *, follow: bool = False) -> Iterator[Delivery]:
        """As ``StreamView.read``."""
        from livedraft.traces.kafka_reader import TopicReader

        with contextlib.closing(TopicReader(self._brokers, self._settings)) as reader:
            yield from reader.read(start, follow=follow)

    def messages(self, partition: str, first: int) -> Iterator[tuple[int, bytes]]:
        """As ``StreamView.messages``."""
        from livedraft.traces.kafka_reader import TopicReader

        with contextlib.closing(TopicReader(self._brokers, self._settings)) as reader:
            yield from reader.messages(partition, first)


def view(settings: Settings) -> StreamView:
    """The stream of ``traces.url``.  Raises SettingsError."""
    url = settings.traces.url
    return TopicView(settings) if url.startswith(KAFKA) else SpoolView(spool_folder(url))


def holdings(settings: Settings, partition: int | None, *, offsets: bool) -> dict[str, Held]:
    """What the partitions hold that a command is about: all that hold something, or the one asked for.

    ``offsets``: whether the command names offsets, which count within one partition.  Raises NotFound, BadRequest.
    """
    url = settings.traces.url
    held = view(settings).held()
    if partition is not None:
        held = {name: bounds for name, bounds in held.items() if name.rpartition("/")[2] == str(partition)}
        if not held:
            raise NotFound(f"{url} has no partition {partition}")
    elif offsets and len(held) > 1:
        raise BadRequest(f"offsets count within one of {len(held)} partitions: say which", field="--partition")
    full = {name: bounds for name, bounds in held.items() if bounds.end > bounds.oldest}
    if not full:
        raise NotFound(f"{url}: no traces there; `livedraft up` and some requests bring them")
    return full
