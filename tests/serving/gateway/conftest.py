"""A gateway on a loopback port in front of a fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx
import pytest
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.app import Endpoint, create_app
from livedraft.serving.gateway.server import DrainingServer, running
from livedraft.traces.sink import SinkCounters

from .fake_engine import FakeEngine


@dataclass(frozen=True)
class Served:
    """A running gateway."""

    engine: FakeEngine
    server: DrainingServer
    http: httpx.Client

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def in_flight(self) -> int:
        endpoint: Endpoint = self.server.config.app.state.endpoint  # type: ignore[union-attr]  # it is our FastAPI
        return endpoint.traffic.in_flight


@contextmanager
def serve(
    engine: FakeEngine | None = None,
    environ: dict[str, str] | None = None,
    stream: Callable[[], SinkCounters] | None = None,
    **settings: object,
) -> Iterator[Served]:
    engine = engine or FakeEngine()
    gateway = Gateway(port=0, **settings)  # type: ignore[arg-type]  # whatever a test sets
    app = create_app(engine, gateway, "fake", opted_out=("shy",), environ=environ or {}, stream=stream)
    with running(app, gateway) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        yield Served(engine, server, http)


Serve = Callable[..., Served]


@pytest.fixture
def chat() -> dict[str, object]:
    """The smallest chat request."""
    return {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def start() -> Iterator[Serve]:
    """Starts gateways that stop with the test: ``start(engine, max_body_bytes=10)``."""
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(serve(*args, **settings))


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """One gateway with default settings for tests that leave nothing behind."""
    with serve() as served:
        yield served
