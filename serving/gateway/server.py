"""Serving the endpoint: uvicorn, with a shutdown that lets running requests finish."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.traffic import Traffic

#: Seconds that answers already complete get to reach their clients.
FLUSH_S = 5
#: Seconds an idle connection is kept: longer than clients and proxies keep theirs, so that they close first.
KEEP_ALIVE_S = 75


class Answering(Protocol):
    """What ``app.state.endpoint`` is: the routes' common ground."""

    traffic: Traffic

    async def close(self) -> None:
        """End what still runs; its clients are told."""


def serve(app: FastAPI, settings: Gateway, stop: threading.Event | None = None) -> None:
    """Answer on ``settings.host:port`` until SIGTERM or SIGINT, drain, close the endpoint, return.

    A second signal ends the drain: what still runs is told so.  ``stop`` set, perhaps by a signal that came before
    the server listened to them, counts as the first.  Belongs in the main thread.  Raises SettingsError when the
    address cannot be used.
    """
    with listen(settings) as listener:
        DrainingServer(app, settings, stop).run(sockets=[listener])


@contextmanager
def running(app: FastAPI, settings: Gateway) -> Iterator[DrainingServer]:
    """The same in a thread of its own, for tests: port 0 takes a free one, see ``DrainingServer.url``."""
    with listen(settings) as listener:
        server = DrainingServer(app, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="gateway")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start; its log says why")
                time.sleep(0.005)
            server.url = "http://{}:{}".format(*listener.getsockname()[:2])
            yield server
        finally:
            server.should_exit = True
            thread.join()


def listen(settings: Gateway) -> socket.socket:
    """A socket bound to ``settings.host:port``.  Raises SettingsError.

    Made from ``getaddrinfo`` because asyncio switches Nagle's algorithm off only for a socket that says it is
    TCP: with it on, streamed tokens wait for the acknowledgement of those before.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, None, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address[0], settings.port, *address[2:]))
        return listener
    except (OSError, OverflowError) as error:
        if listener:
            listener.close()
        where = f"{settings.host}:{settings.port}"
        raise SettingsError(f"gateway.host, gateway.port: cannot listen on {where}: {error}") from error


class DrainingServer(uvicorn.Server):
    """uvicorn that, told to exit, stays reachable until running requests are answered, at most ``drain_s`` seconds.

    /readyz says 503 meanwhile, so that a load balancer looks elsewhere, and new requests are refused.
    """

    def __init__(self, app: FastAPI, settings: Gateway, stop: threading.Event | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,  # the composition root configures logging
                access_log=False,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FLUSH_S,
            )
        )
        self.url = ""
        self._endpoint: Answering = app.state.endpoint
        self._stop = stop
        self._drain_s = settings.drain_s
        self._hurried = False

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends its main loop."""
        stop = self._stop is not None and self._stop.is_set()
        if not await super().on_tick(counter) and not stop:
            return False
        await self._drain()
        return True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks, the second hurries.  Not recorded, or uvicorn would raise it again at the end."""
        self._hurried = self.should_exit
        self.should_exit = True

    async def _drain(self) -> None:
        traffic = self._endpoint.traffic
        traffic.draining = True
        deadline = time.monotonic() + self._drain_s
        while traffic.in_flight and time.monotonic() < deadline and not self._hurried:
            await asyncio.sleep(0.02)
        await self._endpoint.close()  # what is left has had its time
