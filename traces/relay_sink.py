"""The engine's end of a relay: traces leave over ZeroMQ uncompressed, and are dropped before anybody waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque

import zmq
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import tensor_bytes
from livedraft.traces.codec import encode
from livedraft.traces.sink import SinkCounters

log = logging.getLogger(__name__)

SCHEME = "relay+tcp://"

#: Messages in ZeroMQ's hands at once; the others wait in line, where they can still be counted as dropped.
_IN_HAND = 16
#: Seconds between two looks while something is under way, and while nothing is.
_BUSY_S, _IDLE_S = 0.02, 1.0
#: A relay that says nothing for this long is taken for dead, and connected to anew.
_HEARTBEAT_MS, _SILENT_MS = 1000, 5000


class RelaySink:
    """``TraceSink`` onto a relay's PULL socket at ``relay+tcp://host:port``.  Any thread may offer.

        sink = RelaySink("relay+tcp://relay:5555")
        sink.offer(trace)     # serving's thread: enqueues, a few microseconds
        sink.close()

    Delivery is at most once, in order.  What waits, in line or in ZeroMQ's hands, is at most ``buffer_bytes`` and
    ``buffer_traces``: a relay that is away for a moment costs nothing, one that stays away costs traces.  Neither
    redacted nor compressed: both are the relay's work.  Raises SettingsError for a URL that names no host and port.
    """

    def __init__(
        self,
        url: str,
        *,
        buffer_bytes: int = 64 << 20,
        buffer_traces: int = 4096,
        max_trace_bytes: int = 64 << 20,
    ) -> None:
        self._buffer_bytes = buffer_bytes
        self._buffer_traces = buffer_traces
        self._max_trace_bytes = max_trace_bytes
        self._line: deque[Trace] = deque()
        #: Oldest first: what ZeroMQ holds, each with the bytes it was counted with and those of its message.
        self._in_hand: deque[tuple[zmq.MessageTracker, int, int]] = deque()
        self._waiting = self._waiting_bytes = self._offered = self._sent = self._sent_bytes = 0
        self._dropped: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._closed_at: float | None = None
        self._context = zmq.Context()
        self._socket = _push(self._context, url)
        self._thread = threading.Thread(target=self._run, name="trace-relay", daemon=True)
        self._thread.start()

    def offer(self, trace: Trace) -> bool:
        """Take a trace without blocking; False when it was dropped (and counted)."""
        size = tensor_bytes(trace)
        with self._changed:
            self._offered += 1
            if reason := self._refusal(trace, size):
                self._dropped[reason] += 1
                return False
            self._line.append(trace)
            self._waiting += 1
            self._waiting_bytes += size
            self._changed.notify()
            return True

    def counters(self) -> SinkCounters:
        """A snapshot; ``written`` is what the kernel has taken.

        Reasons to drop: "full" (too many or too much in line), "consent", "size" (no relay would take it), "error"
        (ours), "closed".
        """
        with self._changed:
            return SinkCounters(
                offered=self._offered,
                written=self._sent,
                waiting=self._waiting,
                dropped=dict(self._dropped),
                written_bytes=self._sent_bytes,
                waiting_bytes=self._waiting_bytes,
            )

    @property
    def dropped(self) -> int:
        """As ``ports.TraceSink``."""
        with self._changed:
            return self._dropped.total()

    def close(self, timeout: float = 5.0) -> None:
        """Send what was taken, within ``timeout`` seconds (the rest counts as "closed").  Safe to call twice."""
        with self._changed:
            if self._closed_at is None:
                self._closed_at = time.monotonic() + timeout
            self._changed.notify()
        self._thread.join()

    def _refusal(self, trace: Trace, size: int) -> str | None:
        """Why a trace is not taken."""
        if self._closed_at is not None:
            return "closed"
        if not trace.consent:
            return "consent"
        if size > self._max_trace_bytes:
            return "size"
        full = self._waiting >= self._buffer_traces or self._waiting_bytes + size > self._buffer_bytes
        return "full" if full else None

    def _run(self) -> None:
        while not self._expired:
            if (trace := self._take()) is not None:
                self._send(trace)
            elif self._closed_at is not None and not self._in_hand:
                break
        self._socket.close(linger=0)
        self._context.term()
        with self._changed:
            if self._waiting:
                self._dropped["closed"] += self._waiting
            self._waiting = self._waiting_bytes = 0
            self._line.clear()

    @property
    def _expired(self) -> bool:
        return self._closed_at is not None and time.monotonic() >= self._closed_at

    def _take(self) -> Trace | None:
        """The next trace; None when there was none for a moment."""
        with self._changed:
            self._collect()
            if not self._line and (self._in_hand or self._closed_at is None):
                self._changed.wait(_BUSY_S if self._in_hand else _IDLE_S)
                self._collect()
            return self._line.popleft() if self._line else None

    def _collect(self) -> None:
        """Count as sent what ZeroMQ has let go of."""
        while self._in_hand and self._in_hand[0][0].done:
            _, size, sent = self._in_hand.popleft()
            self._settle(size)
            self._sent += 1
            self._sent_bytes += sent

    def _send(self, trace: Trace) -> None:
        size = tensor_bytes(trace)
        try:
            message = encode(trace, packed=False)
        except Exception:
            # One bad trace does not end the thread that sends all others.
            log.exception("trace %s dropped", trace.trace_id)
            return self._drop(size, "error")
        if len(message) > self._max_trace_bytes:
            return self._drop(size, "size")
        del trace  # it can be large, and so is its message
        while not self._expired:
            try:
                tracker = self._socket.send(message, zmq.NOBLOCK, copy=False, track=True)
            except zmq.Again:
                self._socket.poll(int(1000 * _BUSY_S), zmq.POLLOUT)
                with self._changed:
                    self._collect()
                continue
            with self._changed:
                self._in_hand.append((tracker, size, len(message)))
            return None
        return None

    def _drop(self, size: int, reason: str) -> None:
        with self._changed:
            self._settle(size)
            self._dropped[reason] += 1

    def _settle(self, size: int) -> None:
        self._waiting -= 1
        self._waiting_bytes -= size


def _push(context: zmq.Context[zmq.Socket[bytes]], url: str) -> zmq.Socket[bytes]:
    """A socket that connects, and connects again, by itself."""
    socket = context.socket(zmq.PUSH)
    # A message is freed, and so counted as sent, when the kernel has it: only if it is not copied before.
    socket.copy_threshold = 0
    socket.set_hwm(_IN_HAND)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    try:
        if not url.startswith(SCHEME):
            raise zmq.ZMQError(zmq.EPROTONOSUPPORT)
        socket.connect(url.removeprefix("relay+"))
    except zmq.ZMQError as error:
        socket.close(linger=0)
        context.term()
        raise SettingsError(f"traces.url is {url!r}, expected {SCHEME}host:port: {error}") from error
    return socket
