"""Serving's end of the stream: takes a trace in microseconds, writes it on its own thread, drops before it waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from livedraft.contracts.errors import SettingsError, TraceError
from livedraft.contracts.messages import Record, Trace
from livedraft.traces.arrays import tensor_bytes
from livedraft.traces.chunks import MIN_MESSAGE_BYTES, split
from livedraft.traces.codec import encode
from livedraft.traces.redaction import NoRedaction, Redactor
from livedraft.traces.spool import SYNC_INTERVAL_S, SpoolWriter

log = logging.getLogger(__name__)

#: Seconds that ``close`` grants the write in progress, after its timeout.
LAST_WRITE_S = 1.0


class SinkCounters(Record, frozen=True, kw_only=True):
    """What became of the traces offered.  ``offered`` is ``written`` + all ``dropped`` + those still ``waiting``."""

    offered: int
    written: int
    waiting: int
    #: Reason -> traces: "full" (buffer), "consent", "redacted", "disk", "error" (ours), "closed".
    dropped: dict[str, int]
    #: Bytes written, before framing; and bytes of tensors that wait.
    written_bytes: int
    waiting_bytes: int


class SpoolSink:
    """``TraceSink`` onto a spool.  Any thread may offer.

        sink = SpoolSink(lambda: SpoolWriter(folder))
        sink.offer(trace)     # serving's thread: enqueues, a few microseconds
        sink.close()

    A disk that fails costs traces, never an exception: they are counted as "disk" until a try every ``retry_s``
    seconds succeeds.  Raises TraceError when another process writes the spool, SettingsError for settings that
    cannot work.
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
        if message_bytes < MIN_MESSAGE_BYTES:
            raise SettingsError(f"traces.message_bytes is {message_bytes}, expected at least {MIN_MESSAGE_BYTES}")
        self._open_writer = open_writer
        self._buffer_bytes = buffer_bytes
        self._message_bytes = message_bytes
        self._redactor = redactor or NoRedaction()
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._writer: SpoolWriter | None = None
        self._waiting: deque[Trace] = deque()
        self._waiting_bytes = 0
        self._in_hand = 0
        self._changed = threading.Condition()
        self._closed = False
        self._offered = self._written = self._written_bytes = 0
        self._dropped: Counter[str] = Counter()
        try:
            self._open()  # here, so that a second writer is told at once
        except OSError as error:
            self._refused(error)
        self._thread = threading.Thread(target=self._run, name="trace-sink", daemon=True)
        self._thread.start()

    def offer(self, trace: Trace) -> bool:
        """Take a trace without blocking; False when it was dropped (and counted)."""
        size = tensor_bytes(trace)
        with self._changed:
            self._offered += 1
            reason = "closed" if self._closed else "full" if self._waiting_bytes + size > self._buffer_bytes else None
            if reason:
                self._dropped[reason] += 1
                return False
            self._waiting.append(trace)
            self._waiting_bytes += size
            self._changed.notify()
            return True

    def counters(self) -> SinkCounters:
        """A snapshot."""
        with self._changed:
            return SinkCounters(
                offered=self._offered,
                written=self._written,
                waiting=len(self._waiting) + self._in_hand,
                dropped=dict(self._dropped),
                written_bytes=self._written_bytes,
                waiting_bytes=self._waiting_bytes,
            )

    @property
    def dropped(self) -> int:
        """As ``ports.TraceSink``."""
        with self._changed:
            return self._dropped.total()

    def close(self, timeout: float = 5.0) -> None:
        """Write what was taken, within ``timeout`` seconds (the rest counts as "closed").  Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            if self._waiting:
                self._dropped["closed"] += len(self._waiting)
                self._waiting.clear()
                self._waiting_bytes = 0
        self._thread.join(LAST_WRITE_S)

    def _run(self) -> None:
        while not self._done:
            if trace := self._take():
                self._settle(trace, self._process(trace))
            elif self._writer is not None:
                self._on_disk(self._writer.sync_if_due)
        if self._writer is not None:
            self._on_disk(self._writer.close)

    @property
    def _done(self) -> bool:
        with self._changed:
            return self._closed and not self._waiting

    def _take(self) -> Trace | None:
        """The next trace; None after a second without one, or when the sink is closed and empty."""
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait(SYNC_INTERVAL_S)
            if not self._waiting:
                return None
            self._in_hand = 1
            return self._waiting.popleft()

    def _settle(self, trace: Trace, reason: str | None) -> None:
        with self._changed:
            self._in_hand = 0
            self._waiting_bytes = max(0, self._waiting_bytes - tensor_bytes(trace))
            if reason:
                self._dropped[reason] += 1
            else:
                self._written += 1

    def _process(self, trace: Trace) -> str | None:
        """Write one trace; the reason when it was dropped."""
        if not trace.consent:
            return "consent"
        if time.monotonic() < self._retry_at:
            return "disk"
        try:
            if self._redactor.finds(trace) is not None:
                return "redacted"
            messages = split(
                encode(trace),
                key=trace.request_id,
                trace_id=trace.trace_id,
                message_bytes=self._message_bytes,
            )
        except Exception:
            # A boundary: the redactor is the caller's code.  What could not be checked is not written, and one
            # bad trace does not end the thread that writes all others.
            log.exception("trace %s dropped", trace.trace_id)
            return "error"
        return None if self._on_disk(lambda: self._append(messages)) else "disk"

    def _append(self, messages: list[bytes]) -> None:
        if self._writer is None:
            self._open()
        assert self._writer is not None
        self._writer.append(messages)
        self._written_bytes += sum(map(len, messages))
        if self._retry_at:
            log.warning("traces are written again")
            self._retry_at = 0.0

    def _open(self) -> None:
        self._writer = self._open_writer()

    def _on_disk(self, action: Callable[[], object]) -> bool:
        """Do something that the disk may refuse; after a refusal, nothing is tried for ``retry_s``."""
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
