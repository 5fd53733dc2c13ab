"""A stream that one rank reads for all."""

from __future__ import annotations

from collections.abc import Callable

from livedraft.contracts.messages import Delivery, Offsets, Trace
from livedraft.contracts.ports import TraceSource
from livedraft.trainer.ranks import Ranks


class DealtSource:
    """``TraceSource`` whose records rank 0 reads and deals out, by the hash of the trace's id.

    A spool is one partition.  Every rank could read all of it and keep its share, but to read is to decode.  All ranks
    poll at once; the rest is rank 0's, which alone has a ``source``.
    """

    def __init__(self, ranks: Ranks, source: TraceSource | None) -> None:
        self._ranks, self._source = ranks, source

    def seek(self, offsets: Offsets) -> None:
        """As ``TraceSource.seek``."""
        if self._source:
            self._source.seek(offsets)

    def on_release(self, save: Callable[[], None]) -> None:
        """It is not shared with other trainers."""

    def poll(self, timeout: float = 0.0, limit: int = 256) -> list[Delivery]:
        """This rank's of up to ``limit`` items for all."""
        if not self._source:
            return self._ranks.deal(None)
        hands: list[list[Delivery]] = [[] for _ in range(self._ranks.count)]
        for delivery in self._source.poll(timeout, limit):
            item = delivery.item
            hands[self._ranks.holder(item.trace_id) if isinstance(item, Trace) else 0].append(delivery)
        return self._ranks.deal(hands)

    def commit(self, offsets: Offsets) -> None:
        """As ``TraceSource.commit``."""
        if self._source:
            self._source.commit(offsets)

    def committed(self) -> Offsets:
        """What the group committed last; nothing on the other ranks."""
        return self._source.committed() if self._source else {}

    def lag(self) -> int:
        """Records written but not yet polled; none on the other ranks."""
        return self._source.lag() if self._source else 0

    def close(self) -> None:
        """As ``TraceSource.close``."""
        if self._source:
            self._source.close()
