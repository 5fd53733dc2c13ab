"""Serving's end of the stream: takes a trace in microseconds, encodes it on its own thread, drops before it waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Record, Trace
from livedraft.traces.arrays import tensor_bytes
from livedraft.traces.chunks import MIN_MESSAGE_BYTES
from livedraft.traces.parcel import Parcel, pack
from livedraft.traces.redaction import NoRedaction, Redactor

log = logging.getLogger(__name__)

#: Seconds that ``close`` grants the write in progress, after its timeout.
LAST_WRITE_S = 1.0
#: What becomes of a parcel that is not dropped.
WRITTEN, SPILLED = "written", "spilled"

#: Told once what became of a parcel: WRITTEN, SPILLED, or the reason it was dropped.
Settle = Callable[[str], None]


class SinkCounters(Record, frozen=True, kw_only=True):
    """What became of the traces offered: ``offered`` = ``written`` + ``spilled`` + all ``dropped`` + ``waiting``."""

    offered: int
    #: On disk for a spool, acknowledged for a broker.
    written: int
    #: In memory: in line, being encoded, or sent and not acknowledged.
    waiting: int
    #: Reason -> traces: "full" (buffer), "consent", "redacted", "disk", "broker" (refused, or no acknowledgement in
    #: time), "spill" (full, or its disk failed), "error" (ours), "closed".
    dropped: dict[str, int]
    #: Bytes written, before framing; and bytes in memory, those on their way to a broker included.
    written_bytes: int
    waiting_bytes: int
    in_flight_bytes: int = 0
    #: Laid down on disk because the broker was away, and of those (an earlier process's included) acknowledged since.
    spilled: int = 0
    backfilled: int = 0
    #: In the spill now.  What is neither there nor back-filled was refused, or could not be read (see the log).
    lag: int = 0
    #: Seconds since the end of the oldest request that the broker has not acknowledged.
    age_s: float = 0.0


class Outlet(Protocol):
    """Where parcels go.  All on the sink's thread but ``hurry`` and the properties."""

    @property
    def refusal(self) -> str | None:
        """Why a parcel would be dropped now, or None: asked before a trace is encoded in vain."""

    @property
    def in_flight_bytes(self) -> int:
        """Bytes taken by ``put`` that are still in memory."""

    @property
    def backfilled(self) -> int:
        """Parcels of the spill that have been acknowledged."""

    @property
    def lag(self) -> int:
        """Parcels in the spill."""

    @property
    def age_s(self) -> float:
        """Seconds since the end of the oldest request whose parcel has not been written or acknowledged."""

    @property
    def patience_s(self) -> float:
        """Seconds without a parcel after which ``pause`` is called."""

    def put(self, parcel: Parcel, settle: Settle) -> None:
        """Take a parcel; ``settle`` is called once, now or later, and never raises."""

    def pause(self) -> None:
        """Nothing to put for the moment."""

    def hurry(self, deadline: float) -> None:
        """Wait for nothing beyond ``deadline`` (``time.monotonic``) from now on."""

    def close(self) -> None:
        """Settle what was put, release files and threads."""


class QueuedSink:
    """``TraceSink`` in front of an outlet.  Any thread may offer.

        sink = QueuedSink(outlet)
        sink.offer(trace)     # serving's thread: enqueues, a few microseconds
        sink.close()

    At most ``buffer_bytes`` of traces are in memory, in line or in the outlet's hands; beyond that they are dropped.
    Raises SettingsError for settings that cannot work.
    """

    def __init__(
        self,
        outlet: Outlet,
        *,
        buffer_bytes: int = 64 << 20,
        message_bytes: int = 1 << 20,
        redactor: Redactor | None = None,
    ) -> None:
        if message_bytes < MIN_MESSAGE_BYTES:
            raise SettingsError(f"traces.message_bytes is {message_bytes}, expected at least {MIN_MESSAGE_BYTES}")
        self._outlet = outlet
        self._buffer_bytes = buffer_bytes
        self._message_bytes = message_bytes
        self._redactor = redactor or NoRedaction()
        self._line: deque[Trace] = deque()
        #: In line or in hand.
        self._line_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._offered = self._written_bytes = 0
        self._kept: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="trace-sink", daemon=True)
        self._thread.start()

    def offer(self, trace: Trace) -> bool:
        """Take a trace without blocking; False when it was dropped (and counted)."""
        size = tensor_bytes(trace)
        held = self._outlet.in_flight_bytes
        with self._changed:
            self._offered += 1
            full = self._line_bytes + held + size > self._buffer_bytes
            reason = "closed" if self._closed else "full" if full else None
            if reason:
                self._dropped[reason] += 1
                return False
            self._line.append(trace)
            self._line_bytes += size
            self._changed.notify()
            return True

    def counters(self) -> SinkCounters:
        """A snapshot."""
        held, backfilled, lag = self._outlet.in_flight_bytes, self._outlet.backfilled, self._outlet.lag
        with self._changed:
            return SinkCounters(
                offered=self._offered,
                written=self._kept[WRITTEN],
                waiting=self._offered - self._kept.total() - self._dropped.total(),
                dropped=dict(self._dropped),
                written_bytes=self._written_bytes,
                waiting_bytes=self._line_bytes + held,
                in_flight_bytes=held,
                spilled=self._kept[SPILLED],
                backfilled=backfilled,
                lag=lag,
                age_s=self._outlet.age_s,
            )

    @property
    def dropped(self) -> int:
        """As ``ports.TraceSink``."""
        with self._changed:
            return self._dropped.total()

    def close(self, timeout: float = 5.0) -> None:
        """Write what was taken, within ``timeout`` seconds (the rest counts as "closed").  Safe to call twice."""
        self._outlet.hurry(time.monotonic() + timeout)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            if self._line:
                self._dropped["closed"] += len(self._line)
                self._line_bytes -= sum(map(tensor_bytes, self._line))
                self._line.clear()
        self._thread.join(LAST_WRITE_S)

    def _run(self) -> None:
        while not self._done:
            if trace := self._take():
                try:
                    self._process(trace)
                finally:
                    with self._changed:
                        self._line_bytes -= tensor_bytes(trace)
            else:
                self._outlet.pause()
        self._outlet.close()

    @property
    def _done(self) -> bool:
        with self._changed:
            return self._closed and not self._line

    def _take(self) -> Trace | None:
        """The next trace; None when there was none for a while, or when the sink is closed and empty."""
        with self._changed:
            if not self._line and not self._closed:
                self._changed.wait(self._outlet.patience_s)
            return self._line.popleft() if self._line else None

    def _process(self, trace: Trace) -> None:
        if not trace.consent:
            return self._drop("consent")
        if reason := self._outlet.refusal:
            return self._drop(reason)
        try:
            if self._redactor.finds(trace) is not None:
                return self._drop("redacted")
            parcel = pack(trace, self._message_bytes)
        except Exception:
            # A boundary: the redactor is the caller's code.  What could not be checked is not written, and one
            # bad trace does not end the thread that writes all others.
            log.exception("trace %s dropped", trace.trace_id)
            return self._drop("error")
        size = parcel.size

        def settle(fate: str) -> None:
            if fate not in (WRITTEN, SPILLED):
                return self._drop(fate)
            with self._changed:
                self._kept[fate] += 1
                self._written_bytes += size

        self._outlet.put(parcel, settle)
        return None

    def _drop(self, reason: str) -> None:
        with self._changed:
            self._dropped[reason] += 1
