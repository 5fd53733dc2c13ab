"""Requests being answered, and whether new ones are welcome."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from livedraft.contracts.errors import Overloaded


class Traffic:
    """Counts the requests in flight; once ``draining``, refuses new ones.  Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.draining = False

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place while a request is answered.  Raises Overloaded while draining."""
        if self.draining:
            raise Overloaded("the server is shutting down")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
