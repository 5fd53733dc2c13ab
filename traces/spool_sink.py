"""The outlet of a sink into a spool."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from livedraft.contracts.errors import TraceError
from livedraft.traces.parcel import Parcel
from livedraft.traces.redaction import Redactor
from livedraft.traces.sink import WRITTEN, QueuedSink, Settle
from livedraft.traces.spool import SYNC_INTERVAL_S, SpoolWriter

log = logging.getLogger(__name__)


class SpoolSink(QueuedSink):
    """``TraceSink`` onto a spool.

        sink = SpoolSink(lambda: SpoolWriter(folder))

    A disk that fails costs traces, never an exception: they are counted as "disk" until a try every ``retry_s``
    seconds succeeds.  Raises TraceError when another process writes the spool.
    """

    def __init__(
        self,
        open_writer: Callable[[], SpoolWriter],
        *,
        buffer_bytes: int = 64 << 20,
        message_bytes: int = 1 << 20,
        redactor: Redactor | None = None,
        retry_s: float = 1.0,
    ) -> None:
        outlet = SpoolOutlet(open_writer, retry_s)
        super().__init__(outlet, buffer_bytes=buffer_bytes, message_bytes=message_bytes, redactor=redactor)


class SpoolOutlet:
    """Appends parcels to a spool; after a refusal of the disk nothing is tried for ``retry_s`` seconds."""

    #: Nothing stays in memory behind ``put``, and there is nowhere else to go.
    in_flight_bytes = backfilled = lag = 0
    age_s = 0.0
    patience_s = SYNC_INTERVAL_S

    def __init__(self, open_writer: Callable[[], SpoolWriter], retry_s: float) -> None:
        self._open_writer = open_writer
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._writer: SpoolWriter | None = None
        try:
            self._writer = open_writer()  # here, so that a second writer is told at once
        except OSError as error:
            self._refused(error)

    @property
    def refusal(self) -> str | None:
        """As ``Outlet.refusal``."""
        return "disk" if time.monotonic() < self._retry_at else None

    def put(self, parcel: Parcel, settle: Settle) -> None:
        """As ``Outlet.put``."""
        settle(WRITTEN if self._on_disk(lambda: self._append(parcel)) else "disk")

    def pause(self) -> None:
        """Let a pause, too, end durable."""
        if self._writer is not None:
            self._on_disk(self._writer.sync_if_due)

    def hurry(self, deadline: float) -> None:
        """A disk does not hurry."""

    def close(self) -> None:
        """As ``Outlet.close``."""
        if self._writer is not None:
            self._on_disk(self._writer.close)

    def _append(self, parcel: Parcel) -> None:
        if self._writer is None:
            self._writer = self._open_writer()
        self._writer.append(parcel.messages)
        if self._retry_at:
            log.warning("traces are written again")
            self._retry_at = 0.0

    def _on_disk(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except (OSError, TraceError) as error:
            self._refused(error)
            return False
        return True

    def _refused(self, error: Exception) -> None:
        if not self._retry_at:
            log.warning("traces are dropped, trying again every %g s: %s", self._retry_s, error)
        self._retry_at = time.monotonic() + self._retry_s
