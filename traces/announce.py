"""Candidates and decisions on topics of their own, for those who watch the loop from outside."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import msgspec
from livedraft.contracts.messages import SCHEMA_MAJOR, SCHEMA_MINOR, Decision, DrafterVersion
from livedraft.traces.outlet import BrokerOutlet
from livedraft.traces.parcel import SCHEMA, Parcel
from livedraft.traces.sink import WRITTEN

log = logging.getLogger(__name__)

#: Announcements that wait for a broker before the oldest is dropped: the registry has them all.
_CAPACITY = 1000
_TICK_S = 0.2


class Announcer:
    """``Announcements`` through two outlets, fed by a thread of its own.

    announcer = Announcer(drafts=outlet, swaps=other)
    announcer.candidate(version)      # returns at once
    announcer.close()
    """

    def __init__(self, *, drafts: BrokerOutlet, swaps: BrokerOutlet) -> None:
        self._drafts, self._swaps = drafts, swaps
        self._waiting: deque[tuple[BrokerOutlet, Parcel]] = deque(maxlen=_CAPACITY)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)
        self._thread.start()

    def candidate(self, version: DrafterVersion) -> None:
        """As ``Announcements.candidate``."""
        self._enqueue(self._drafts, _parcel(version.version, version))

    def decision(self, decision: Decision) -> None:
        """As ``Announcements.decision``."""
        self._enqueue(self._swaps, _parcel(decision.candidate or decision.live or "", decision))

    def close(self, timeout: float = 2.0) -> None:
        """Send what waits, within ``timeout`` seconds.  Safe to call twice."""
        deadline = time.monotonic() + timeout
        for outlet in (self._drafts, self._swaps):
            outlet.hurry(deadline)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout + 1.0)

    def _enqueue(self, outlet: BrokerOutlet, parcel: Parcel) -> None:
        with self._changed:
            self._waiting.append((outlet, parcel))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._closed:
                    self._changed.wait(_TICK_S)
                taken = self._waiting.popleft() if self._waiting else None
                if taken is None and self._closed:
                    break
            if taken is None:
                self._drafts.pause()
                self._swaps.pause()
            else:
                outlet, parcel = taken
                outlet.put(parcel, _settle)
        self._drafts.close()
        self._swaps.close()


def _settle(fate: str) -> None:
    if fate != WRITTEN:
        log.warning("an announcement was not taken (%s); the registry has it", fate)


def _parcel(key: str, record: DrafterVersion | Decision) -> Parcel:
    schema = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}".encode()
    message = msgspec.json.encode(record)
    return Parcel(key=key.encode(), headers=((SCHEMA, schema),), messages=(message,), at=time.time())
