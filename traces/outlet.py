"""The outlet of a sink into a broker that may stall, refuse or die: what is in flight is bounded, and may spill.

Nothing here knows which broker it is: ``kafka`` provides the ``Sender``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from livedraft.contracts.errors import StreamUnavailable, TraceError
from livedraft.traces.connecting import Connecting
from livedraft.traces.parcel import Parcel
from livedraft.traces.sink import SPILLED, WRITTEN, Settle
from livedraft.traces.spill import Spill, Spilled

log = logging.getLogger(__name__)

#: Seconds without any acknowledgement after which a full window means that the broker is away.
STALL_S = 1.0
#: Longest sleep while something is under way, and share of the time to close that is kept for the disk.
_TICK_S, _DISK_SHARE = 0.05, 0.25
#: Seconds between an acknowledgement and the next parcel, when the window is full: acknowledgements come in bunches,
#: after which the client's thread has the next request to send, and an encoder beside it would hold it up.
_GATHER_S = 0.004


class Sender(Protocol):
    """A connected client of the broker."""

    def send(self, parcel: Parcel, done: Callable[[Exception | None], None]) -> None:
        """Queue every message of a parcel; messages of one key arrive in the order of ``send``.

        ``done`` is called once, on any thread: None when all are acknowledged, else the first failure, which is
        StreamUnavailable where sending it again may help.
        Raises StreamUnavailable when nothing could be queued; then ``done`` is not called.
        """

    def close(self, timeout: float) -> None:
        """Give up what is not acknowledged within ``timeout`` seconds.  Never raises."""


class _Flight:
    """A parcel in the client's hands; ``settle`` is None for one that comes from the spill."""

    def __init__(self, parcel: Parcel, settle: Settle | None, offset: int = 0) -> None:
        self.parcel = parcel
        self.settle = settle
        self.offset = offset
        self.error: Exception | None = None
        #: Set last, by the client's thread.
        self.landed = False


class BrokerOutlet:
    """Sends parcels in order, and settles each in order by what the broker acknowledged.

    At most ``window_bytes`` are in the client's hands; beyond that ``put`` waits, the line in front of it fills, and
    its sink drops.  With a ``spill`` it waits no longer than ``STALL_S``: when a delivery fails, or the window is full
    and nothing was acknowledged for that long, the connection is given up and all that was in flight is laid down.

    While the spill holds anything, new parcels go behind it, and a new connection is fed from its front.  So the
    parcels of one key arrive in order, and some twice: what was acknowledged too late is sent again.
    """

    #: Whatever the broker does, a parcel has a chance.
    refusal = None

    def __init__(
        self,
        connect: Callable[[], Sender],
        *,
        window_bytes: int = 16 << 20,
        spill: Spill | None = None,
        retry_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connecting = Connecting(connect, retry_s)
        self._window_bytes = window_bytes
        self._spill = spill
        self._clock = clock
        self._deadline = float("inf")
        #: In the order of sending; all straight from ``put``, or all from the spill.
        self._flights: deque[_Flight] = deque()
        self._landing = threading.Event()
        self._moved_at = clock()
        #: Read by other threads.
        self.in_flight_bytes = 0
        self.backfilled = 0
        self._complained = False
        self._waiting_since = time.time()

    @property
    def lag(self) -> int:
        """As ``Outlet.lag``."""
        return len(self._spill) if self._spill else 0

    @property
    def age_s(self) -> float:
        """As ``Outlet.age_s``."""
        return max(0.0, time.time() - self._waiting_since) if self.in_flight_bytes or self.lag else 0.0

    @property
    def patience_s(self) -> float:
        """Short while something is under way."""
        return _TICK_S if self._flights or self.lag else 0.5

    def put(self, parcel: Parcel, settle: Settle) -> None:
        """As ``Outlet.put``."""
        if self._room_for(parcel.size):
            if self._send(_Flight(parcel, settle)):
                return
            if self._spill is not None:
                self._give_up("it took nothing")
        self._lay_down(parcel, settle)

    def pause(self) -> None:
        """Look after what landed and after the spill."""
        self._connecting.poll()
        self._attend()

    def hurry(self, deadline: float) -> None:
        """As ``Outlet.hurry``; part of the time is kept for laying down what the broker does not take."""
        now = self._clock()
        self._deadline = now + (1 - _DISK_SHARE) * max(0.0, deadline - now)
        self._landing.set()

    def close(self) -> None:
        """Wait for acknowledgements until the deadline; the rest goes to the spill, or counts as "closed"."""
        while self._flights and self._clock() < self._deadline:
            self._attend(refill=False)
            self._rest()
        self._attend(refill=False)
        self._connecting.close()
        if self._spill is not None:
            if self._flights:
                self._give_up("closing")
            self._on_disk(self._spill.close)
        while self._flights:
            self._settle(self._flights.popleft(), "closed")

    def _room_for(self, size: int) -> bool:
        """Wait until the client may take ``size`` more bytes; False when the parcel must go elsewhere."""
        began = self._clock()
        while True:
            self._attend()
            if self.lag:
                return False
            if self._connecting.poll() and (self.in_flight_bytes + size <= self._window_bytes or not self._flights):
                return True
            now = self._clock()
            stalled = now - max(began, self._moved_at) > STALL_S
            if now >= self._deadline or (self._spill is not None and stalled):
                if self._spill is not None:
                    self._give_up("it does not answer")
                return False
            self._rest()

    def _rest(self) -> None:
        """Until something lands, or a moment has passed."""
        if self._landing.wait(min(_TICK_S, max(0.001, self._deadline - self._clock()))):
            time.sleep(_GATHER_S)
        self._landing.clear()

    def _send(self, flight: _Flight) -> bool:
        sender = self._connecting.poll()
        if sender is None:
            return False

        def done(error: Exception | None) -> None:
            flight.error, flight.landed = error, True
            self._landing.set()

        try:
            sender.send(flight.parcel, done)
        except StreamUnavailable as error:
            self._complain(error)
            self._connecting.renew()
            return False
        if not self._flights:
            self._moved_at, self._waiting_since = self._clock(), flight.parcel.at
        self._flights.append(flight)
        self.in_flight_bytes += flight.parcel.size
        return True

    def _attend(self, *, refill: bool = True) -> None:
        """Settle what landed, from the front; give up on a failure; send on from the spill."""
        while self._flights and self._flights[0].landed:
            flight = self._flights[0]
            if flight.error is None:
                self._flights.popleft()
                self._settle(flight, WRITTEN)
                self._moved_at = self._clock()
                self._complained = self._complained and self.lag > 0
            elif self._spill is None or not isinstance(flight.error, StreamUnavailable):
                self._complain(flight.error)
                self._flights.popleft()
                self._settle(flight, "broker")
            else:
                self._give_up(str(flight.error))
        if self._spill is not None:
            if self.lag and refill:
                self._refill(self._spill)
            self._on_disk(self._spill.tidy)

    def _settle(self, flight: _Flight, fate: str) -> None:
        self.in_flight_bytes -= flight.parcel.size
        if self._flights:
            self._waiting_since = self._flights[0].parcel.at
        if flight.settle is not None:
            flight.settle(fate)
        elif self._spill is not None:
            self._spill.acknowledge(flight.offset)
            self.backfilled += fate == WRITTEN
            if not self.lag:
                log.warning("the spill is empty; traces go to the broker again")

    def _give_up(self, reason: str) -> None:
        """Lay down, in order, what the broker has not acknowledged, and connect anew."""
        if not self.lag:
            log.warning("the broker is away (%s): traces go to the spill", reason)
        assert self._spill is not None
        self._connecting.renew()  # first: late acknowledgements go unheard, and memory goes free
        flights, self._flights = self._flights, deque()
        self.in_flight_bytes = 0
        for flight in flights:
            if flight.settle is None:
                continue
            if flight.landed and flight.error is None:
                flight.settle(WRITTEN)
            else:
                self._lay_down(flight.parcel, flight.settle)
        self._spill.rewind()

    def _lay_down(self, parcel: Parcel, settle: Settle) -> None:
        if self._spill is None:
            settle("closed" if self._clock() >= self._deadline else "broker")
            return
        if not self.lag:
            self._waiting_since = parcel.at
        try:
            settle(SPILLED if self._spill.append(parcel) else "spill")
        except (OSError, TraceError) as error:
            self._complain(error)
            settle("spill")

    def _refill(self, spill: Spill) -> None:
        """Send from the spill as far as the window allows."""
        while not self._flights or self.in_flight_bytes < self._window_bytes:
            if self._connecting.poll() is None:
                return
            spilled = self._next(spill)
            if spilled is None:
                return
            if not self._send(_Flight(spilled.parcel, None, spilled.offset)):
                self._give_up("it took nothing")
                return

    def _next(self, spill: Spill) -> Spilled | None:
        try:
            return spill.read()
        except OSError as error:
            self._complain(error)
            return None

    def _on_disk(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, TraceError) as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Once per outage: every trace of a busy hour would say the same."""
        if not self._complained:
            log.warning("%s: %s", type(error).__name__, error)
        self._complained = True
