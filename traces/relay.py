"""The relay: takes traces from engines over ZeroMQ, and hands them to a sink that redacts, encodes and publishes.

    relay = Relay(settings.relay, sink)
    relay.run(stop)                      # until the threading.Event ``stop`` is set

A frame is one record of ``codec``, its features uncompressed.  Memory is bounded: a few frames for each engine, and
what the sink may hold; beyond that traces are dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time

import zmq
from livedraft.contracts.errors import CorruptRecord, SettingsError, UnsupportedSchema
from livedraft.contracts.ports import TraceSink
from livedraft.contracts.settings import Relay as Settings
from livedraft.traces.codec import decode

log = logging.getLogger(__name__)

#: Frames that wait for us, of each engine.
_WAITING = 4
_LOOK_MS = 200
#: Seconds without a turn of the loop after which something hangs.
_ALIVE_S = 10.0
#: Seconds between two complaints about malformed frames.
_QUIET_S = 10.0
#: Seconds in which, told to stop, we still take what has arrived.
_LAST_S = 1.0


class Relay:
    """One PULL socket and one loop.  Raises SettingsError when it cannot listen."""

    def __init__(self, settings: Settings, sink: TraceSink) -> None:
        self._sink = sink
        self.received = 0
        self.received_bytes = 0
        self.malformed = 0
        self._complain_at = 0.0
        self._turned_at = time.monotonic()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(_WAITING)
        self._socket.setsockopt(zmq.MAXMSGSIZE, settings.max_trace_bytes)
        try:
            self._socket.bind(settings.listen)
        except zmq.ZMQError as error:
            self._close()
            raise SettingsError(f"relay.listen is {settings.listen!r}, expected tcp://host:port: {error}") from error
        #: As ZeroMQ spells it, the port resolved where it was ``*``.
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def healthy(self) -> bool:
        """Whether the loop turns."""
        return time.monotonic() - self._turned_at < _ALIVE_S

    def run(self, stop: threading.Event) -> None:
        """Take traces until ``stop`` is set, then what has arrived already."""
        try:
            while not stop.is_set():
                self._turned_at = time.monotonic()
                if self._socket.poll(_LOOK_MS):
                    self._take()
            end = time.monotonic() + _LAST_S
            while time.monotonic() < end and self._socket.poll(0):
                self._take()
        finally:
            self._close()

    def _take(self) -> None:
        frames = self._socket.recv_multipart()
        self.received += 1
        self.received_bytes += sum(map(len, frames))
        try:
            if len(frames) != 1:
                raise CorruptRecord(f"a message of {len(frames)} frames, expected 1")
            trace = decode(frames[0])
        except (CorruptRecord, UnsupportedSchema) as error:
            self._refuse(error)
            return
        self._sink.offer(trace)  # which counts what it drops

    def _refuse(self, error: Exception) -> None:
        self.malformed += 1
        if time.monotonic() >= self._complain_at:
            self._complain_at = time.monotonic() + _QUIET_S
            log.warning("%d malformed so far, dropped; the latest: %s", self.malformed, error)

    def _close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
