"""From the engine's thread to the event loop, and on to a client who may leave at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
from livedraft.contracts.errors import LivedraftError
from livedraft.contracts.messages import Delta, Generation
from livedraft.contracts.ports import Engine
from livedraft.serving.gateway.errors import error_body
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


@contextmanager
def submitted(engine: Engine, generations: Sequence[Generation]) -> Iterator[AsyncIterator[tuple[int, Delta]]]:
    """Hand ``generations`` to the engine; yields (index, Delta) as they come, until all are finished.

    Leaving the block cancels whatever has not finished, however it is left:

        with submitted(engine, generations) as deltas:
            async for index, delta in deltas: ...

    The queue has no bound of its own: a generation has at most ``max_tokens`` + 1 Deltas.  Raises what
    ``Engine.submit`` raises; then none of the generations goes on.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
    unfinished = dict(enumerate(generation.request_id for generation in generations))

    def emit(index: int, delta: Delta) -> None:
        with suppress(RuntimeError):  # the loop has closed, nobody listens; the engine's thread must go on
            loop.call_soon_threadsafe(queue.put_nowait, (index, delta))

    async def deltas() -> AsyncIterator[tuple[int, Delta]]:
        while unfinished:
            index, delta = await queue.get()
            if delta.finish_reason:
                del unfinished[index]
            yield index, delta

    try:
        for index, generation in enumerate(generations):
            engine.submit(generation, partial(emit, index))
        yield deltas()
    finally:
        for request_id in unfinished.values():
            engine.cancel(request_id)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``.  When the client leaves first, ``work`` is cancelled and ClientDisconnect raised."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """Server-sent events of ``chunks``, ending in ``[DONE]`` or, when the engine fails midway, an error object.

    ``held`` is closed as soon as the stream ends or the client leaves.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], held: ExitStack) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until done or alone."""
        with self._held, suppress(ClientDisconnect):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield msgspec.json.encode(chunk)
            yield b"[DONE]"
        except LivedraftError as error:
            yield msgspec.json.encode(error_body(error))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
