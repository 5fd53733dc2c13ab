"""The limit on request bodies, declared or not."""

from __future__ import annotations

from livedraft.contracts.errors import BodyTooLarge
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: reading a body past ``limit`` bytes raises BodyTooLarge where it is read.

    A declared ``content-length`` is refused before a byte is read; a chunked body is counted as it comes, so
    never more than ``limit`` bytes and one chunk are held.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a receive that counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        received = 0

        async def limited() -> Message:
            nonlocal received
            if int(declared) > self._limit:  # the server has checked that it is a number
                raise self._too_large()
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._limit} bytes")
