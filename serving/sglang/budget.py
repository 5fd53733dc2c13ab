"""What waits in memory, counted in bytes before it is copied."""

from __future__ import annotations

import threading
import weakref


class Budget:
    """At most ``limit`` bytes claimed at once.  A claim ends with its owner at the latest, so that none can leak.

    Thread-safe; owners are compared by identity and must allow weak references.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._claims: dict[int, int] = {}
        self._owners: dict[int, weakref.ref[object]] = {}
        self._held = 0
        # A collected owner may give back at any moment, also while the lock is held.
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """Bytes claimed."""
        return self._held

    def crowded(self, size: int = 0) -> bool:
        """Whether more than half is claimed, or would be with ``size`` more bytes."""
        return 2 * (self._held + size) > self._limit

    def fits(self, size: int) -> bool:
        """Whether ``size`` more bytes may be claimed."""
        return self._held + size <= self._limit

    def claim(self, owner: object, size: int) -> None:
        """Count ``size`` more bytes as ``owner``'s."""
        key = id(owner)
        with self._lock:
            if key not in self._claims:
                self._owners[key] = weakref.ref(owner, lambda _: self._give_back(key))
                self._claims[key] = 0
            self._claims[key] += size
            self._held += size

    def release(self, owner: object) -> None:
        """Give back what ``owner`` claimed; nothing when it has none."""
        with self._lock:
            if (key := id(owner)) in self._claims:
                self._held -= self._claims[key]
                self._claims[key] = 0

    def _give_back(self, key: int) -> None:
        with self._lock:
            self._held -= self._claims.pop(key, 0)
            self._owners.pop(key, None)
