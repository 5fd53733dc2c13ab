"""What the endpoint measures, and the engine's counters read at each scrape."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from livedraft.contracts import metrics as names
from livedraft.contracts.messages import SwapReceipt
from livedraft.contracts.ports import Engine
from livedraft.serving.gateway.errors import CLIENT_CLOSED_REQUEST
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class HttpMetrics:
    """What any endpoint counts and times, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(names.REQUESTS, "HTTP requests answered.", ("route", "status"), registry=self.registry)
        self.request_seconds = Histogram(
            names.REQUEST_SECONDS,
            "Seconds from request to the last byte of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )


class Metrics(HttpMetrics):
    """With the engine's."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.registry.register(EngineCollector(engine))
        self.first_token_seconds = Histogram(
            names.FIRST_TOKEN_SECONDS,
            "Seconds from request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._swaps = Counter(names.SWAPS, "Drafter swaps applied over HTTP.", registry=self.registry)
        self._swap_stall_seconds = Histogram(
            names.SWAP_STALL_SECONDS,
            "Seconds a swap held the engine's loop.",
            buckets=(0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 1),
            registry=self.registry,
        )

    def swapped(self, receipt: SwapReceipt) -> None:
        """Count an applied swap."""
        self._swaps.inc()
        self._swap_stall_seconds.observe(receipt.stall_s)


class EngineCollector(Collector):
    """The engine's status as metrics."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the engine once."""
        try:
            status = self._engine.status()
        except Exception:  # whatever a dead engine raises, it must not hide the endpoint's own numbers
            return
        yield CounterMetricFamily(names.OUTPUT_TOKENS, "Tokens generated.", status.output_tokens)
        yield CounterMetricFamily(names.VERIFY_ROUNDS, "Target forward passes that yielded them.", status.rounds)
        accept = GaugeMetricFamily(names.ACCEPT_LENGTH, "Tokens per verify round.", labels=["drafter"])
        for drafter, (tokens, rounds) in status.by_drafter.items():
            if rounds:
                accept.add_metric([drafter], tokens / rounds)
        yield accept
        yield GaugeMetricFamily(names.RUNNING, "Requests being decoded.", status.running)
        yield GaugeMetricFamily(names.WAITING, "Requests waiting for a place.", status.waiting)
        live = {"version": status.drafter, "checksum": status.drafter_checksum}
        yield InfoMetricFamily(names.DRAFTER_INFO, "The drafter in service.", live)
        yield CounterMetricFamily(names.TRACES_OFFERED, "Traces offered to the stream.", status.traces_offered)
        yield CounterMetricFamily(names.TRACES_DROPPED, "Traces dropped instead of waiting.", status.traces_dropped)


class Observed:
    """ASGI middleware: gives every request an id and a start time, answers with an id, counts and times it.

    The id in the answer is the application's where it has set one, so that an engine's comes through a gateway.

    ``request.state.request_id`` is a str, ``request.state.started`` in seconds of ``time.perf_counter``.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, watching what it sends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started = uuid.uuid4().hex, time.perf_counter()
        scope.setdefault("state", {}).update(request_id=request_id, started=started)
        status = 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault("x-request-id", request_id)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            # The route's pattern, never the path: a scan for random paths must not grow the registry.
            route = scope["route"].path if "route" in scope else "unmatched"
            self._metrics.requests.labels(route, str(status)).inc()
            if status != CLIENT_CLOSED_REQUEST:
                self._metrics.request_seconds.labels(route).observe(time.perf_counter() - started)
