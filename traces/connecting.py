"""A connection made and renewed on a thread of its own, so that nobody waits for a host that does not answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from livedraft.contracts.errors import LivedraftError

log = logging.getLogger(__name__)


class Closeable(Protocol):
    """A connection."""

    def close(self, timeout: float) -> None:
        """Within ``timeout`` seconds; never raises."""


C = TypeVar("C", bound=Closeable)


class Connecting(Generic[C]):
    """One connection, wanted always.  ``poll``, ``renew`` and ``close`` belong to one thread.

        if connection := connecting.poll():
            ...

    ``connect`` raises a LivedraftError while there is none; it is tried again after ``retry_s`` seconds, and the
    failure logged once.
    """

    def __init__(self, connect: Callable[[], C], retry_s: float) -> None:
        self._connect = connect
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._connection: C | None = None
        self._thread: threading.Thread | None = None
        self._made: C | None = None
        self._complaint = ""
        self._closed = False

    def poll(self) -> C | None:
        """The connection, or None while there is none.  Never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            self._connection, self._made = self._made, None
            self._retry_at = time.monotonic() + self._retry_s
        if self._connection is None and self._thread is None and time.monotonic() >= self._retry_at:
            self._start(self._make)
        return self._connection

    def renew(self) -> None:
        """Let go of the connection, and make another in ``retry_s`` seconds."""
        if self._connection is not None:
            old, self._connection = self._connection, None
            self._start(lambda: old.close(0.0))

    def close(self, timeout: float = 0.5) -> None:
        """Let go of the connection.  Safe to call twice."""
        self._closed = True
        if self._connection is not None:
            self._connection.close(timeout)
            self._connection = None

    def _start(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="connecting", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        try:
            made = self._connect()
        except LivedraftError as error:
            if str(error) != self._complaint:
                log.warning("%s; trying again every %g s", error, self._retry_s)
            self._complaint = str(error)
            return
        self._complaint = ""
        if self._closed:
            made.close(0.0)
        else:
            self._made = made
