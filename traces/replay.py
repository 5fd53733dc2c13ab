"""Walks a stream from an offset, leaving its consumers' offsets alone."""

from __future__ import annotations

from collections.abc import Iterator

from livedraft.contracts.messages import Delivery, Offsets
from livedraft.contracts.ports import TraceSource

#: Items decoded at a time, so that a long stream is never in memory whole.
_BATCH = 64


def replay(source: TraceSource, start: Offsets | None = None, *, follow: bool = False) -> Iterator[Delivery]:
    """Every item from ``start`` (default: the oldest) to the end, or for ever when ``follow``.

    The iterator blocks for at most a second at a time while it follows, so that Ctrl-C is heard.
    """
    source.seek(start or {})
    while (items := source.poll(timeout=1.0 if follow else 0.0, limit=_BATCH)) or follow:
        yield from items
