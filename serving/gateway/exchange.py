"""One request to one engine and its answer, in the words of the engine's make."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class ClientRequest:
    """A client's request as it leaves the gateway for an engine of our own make."""

    method: str
    #: Path, and path with query as the client wrote it.
    path: str
    target: bytes
    headers: Headers
    body: bytes
    request_id: str
    #: Whose key it came with, and the tenants whose requests are never traced.
    tenant: str
    opted_out: Collection[str]
    #: The client's own headers.
    said: Mapping[str, str]


class Refused(Exception):
    """A stream that began with an error: the answer it should have been, nothing of which has gone out."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class Exchange(Protocol):
    """What is sent, and what becomes of the answer before the client gets it."""

    asked: ClientRequest

    def whole(self, status: int, body: bytes) -> tuple[int, bytes]:
        """Status and body of an answer that came in one piece."""

    def events(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A stream of server-sent events; each item holds whole ones.  The first may raise Refused instead."""


class AsItIs:
    """Our own engine's: it says what clients are to hear."""

    def __init__(self, asked: ClientRequest) -> None:
        self.asked = asked

    def whole(self, status: int, body: bytes) -> tuple[int, bytes]:
        """As ``Exchange``."""
        return status, body

    def events(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """As ``Exchange``."""
        return events
