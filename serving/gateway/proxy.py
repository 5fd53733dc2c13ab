"""The gateway as a process of its own: keys, tenants and limits here, answers from engines over HTTP.

    any   /v1/...                      GET /healthz  /readyz  /metrics

A client's key ends here.  Engines get the tenant in ``X-Livedraft-Tenant`` together with ``gateway.engine_key``, the
secret that makes them believe it; the same header from a client is dropped.  What a tenant opted out of is also said
in ``X-Livedraft-Trace``, which engines honour from everybody because it can only take away.  ``/admin`` is not
routed: drafters are swapped by the controller, at the engine.

SGLang hears and says the same in words of its own, see ``sglang``; of it only OpenAI's routes above and the models
are passed on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
from fastapi import FastAPI, Request, Response
from livedraft.contracts import metrics as names
from livedraft.contracts.engines import EngineAddress
from livedraft.contracts.errors import BadRequest, EngineUnavailable, LivedraftError, NotFound, Overloaded
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway import errors
from livedraft.serving.gateway.errors import error_body
from livedraft.serving.gateway.exchange import AsItIs, ClientRequest, Exchange, Headers, Refused
from livedraft.serving.gateway.generations import TRACE_HEADER
from livedraft.serving.gateway.keys import TENANT_HEADER, load_keys
from livedraft.serving.gateway.limits import BodyLimit
from livedraft.serving.gateway.metrics import HttpMetrics, Observed
from livedraft.serving.gateway.replicas import Replica, ReplicaCollector, Replicas
from livedraft.serving.gateway.schema import decode
from livedraft.serving.gateway.sglang import SglangExchange
from livedraft.serving.gateway.stream import while_connected
from livedraft.serving.gateway.traffic import Traffic
from prometheus_client import Counter
from prometheus_client.exposition import choose_encoder
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

#: Seconds a neighbour gets to accept a connection.
_CONNECT_S = 2.0
#: Of a connection, not of a message (RFC 9110, section 7.6.1).
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
#: What a client says that is not for the engine: its key, who it claims to be, and what we set ourselves.  Answers are
#: asked for as they are, because a compressed stream has no events to tell apart.
_ENDS_HERE = _HOP_BY_HOP | {
    "accept-encoding",
    "authorization",
    "content-length",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
    TENANT_HEADER,
}
#: What our own server says.
_OURS = _HOP_BY_HOP | {"content-length", "date", "server"}


def create_proxy(
    settings: Gateway,
    engines: Sequence[EngineAddress],
    *,
    opted_out: Collection[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> FastAPI:
    """The endpoint in front of ``engines``.

    ``opted_out`` are the tenants whose requests are never traced.  Raises SettingsError for an unusable file of keys.
    """
    proxy = Proxy(settings, engines, opted_out, environ)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with proxy.connected():
            yield

    app = FastAPI(title="livedraft", openapi_url=None, lifespan=lifespan)
    app.state.endpoint = proxy
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Observed, metrics=proxy.metrics)
    errors.install(app)
    for methods, path, answer in proxy.routes:
        app.add_api_route(path, answer, methods=methods)
    return app


class _Limited(msgspec.Struct):
    """The fields that cost: an engine of another make may not know our limits."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None


class Proxy:
    """The routes and what they need."""

    def __init__(
        self,
        settings: Gateway,
        engines: Sequence[EngineAddress],
        opted_out: Collection[str],
        environ: Mapping[str, str],
    ) -> None:
        self.traffic = Traffic()
        self.metrics = HttpMetrics()
        self.replicas = Replicas(engines, settings.admin_key)
        self.metrics.registry.register(ReplicaCollector(self.replicas))
        self.retries = Counter(
            names.RETRIES, "Requests given to a second engine because the first failed.", registry=self.metrics.registry
        )
        self.closing = False
        self.forwarding: set[asyncio.Task[Any]] = set()
        self._settings = settings
        self._keys = load_keys(settings.api_keys_file, environ)
        self._opted_out = frozenset(opted_out)
        self._client: httpx.AsyncClient | None = None
        if self._keys and not settings.engine_key:
            log.warning("gateway.engine_key is not set: engines do not learn whose requests they answer")

    @property
    def routes(self) -> list[tuple[list[str], str, Callable[..., Any]]]:
        """(methods, path, answer)."""
        return [
            (["POST"], "/v1/chat/completions", self.generate),
            (["POST"], "/v1/completions", self.generate),
            (["GET"], "/v1/models", self.forward),
            (["GET", "POST"], "/v1/{rest:path}", self.forward),
            (["GET"], "/healthz", self.healthz),
            (["GET"], "/readyz", self.readyz),
            (["GET"], "/metrics", self.scrape),
        ]

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Know and reach the engines while the block runs."""
        timeout = httpx.Timeout(self._settings.engine_timeout_s, connect=_CONNECT_S, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # Engines are neighbours: no proxy of the environment stands between.
        async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
            self._client = client
            watching = asyncio.create_task(self.replicas.watch(client, self._settings.health_s))
            try:
                yield
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def close(self) -> None:
        """End what still runs; its clients are told."""
        self.closing = True
        for task in self.forwarding:
            task.cancel()

    async def generate(self, request: Request) -> Response:
        """A request for tokens."""
        return await self._forward(request, self._check_limits)

    async def forward(self, request: Request) -> Response:
        """Any other."""
        return await self._forward(request, lambda _: None)

    async def healthz(self) -> Response:
        """The process answers."""
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def readyz(self) -> Response:
        """New requests are welcome; 503 while draining or without an engine."""
        if self.traffic.draining:
            raise Overloaded("the server is shutting down")
        if not self.replicas.ready():
            raise Overloaded("no engine is ready")
        return Response(b'{"status":"ready"}', media_type="application/json")

    async def scrape(self, request: Request) -> Response:
        """Prometheus metrics in the format the scraper prefers."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.metrics.registry), headers={"content-type": content_type})

    def build(self, replica: Replica, asked: ClientRequest) -> httpx.Request:
        """The request as ``replica`` gets it."""
        assert self._client is not None
        url = httpx.URL(replica.base).copy_with(raw_path=asked.target)
        return self._client.build_request(asked.method, url, headers=asked.headers, content=asked.body)

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Its answer, unread.  Raises httpx.TransportError."""
        assert self._client is not None
        return await self._client.send(request, stream=True)

    async def _forward(self, request: Request, check: Callable[[bytes], None]) -> Response:
        with ExitStack() as held:
            held.enter_context(self.traffic.admit())
            tenant = self._keys.tenant(request.headers.get("authorization"))
            _require_plain(request.scope["path"])
            body = await request.body()
            check(body)
            target: bytes = request.scope["raw_path"]
            if query := request.scope["query_string"]:
                target += b"?" + query
            asked = ClientRequest(
                method=request.method,
                path=request.scope["path"],
                target=target,
                headers=self._headers(request, tenant),
                body=body,
                request_id=request.state.request_id,
                tenant=tenant,
                opted_out=self._opted_out,
                said=request.headers,
            )
            return Forwarded(self, asked, held.pop_all())

    def _check_limits(self, body: bytes) -> None:
        """Raises BadRequest naming field and limit."""
        asked = decode(body, _Limited)
        limit, choices = self._settings.max_tokens_limit, self._settings.max_choices
        for name in ("max_tokens", "max_completion_tokens"):
            if (getattr(asked, name) or 0) > limit:
                raise BadRequest(f"must be at most {limit}", field=name)
        if (asked.n or 1) > choices:
            raise BadRequest(f"asks for {asked.n} choices, at most {choices} are allowed", field="n")

    def _headers(self, request: Request, tenant: str) -> Headers:
        named = {name.strip().lower() for name in request.headers.get("connection", "").split(",")}
        headers = _without(_ENDS_HERE | named, request.headers.raw)
        headers.append((b"accept-encoding", b"identity"))
        if key := self._settings.engine_key:
            headers.append((b"authorization", b"Bearer " + key.encode()))
            headers.append((TENANT_HEADER.encode(), quote(tenant).encode()))
        if tenant in self._opted_out:
            headers = [*_without({TRACE_HEADER}, headers), (TRACE_HEADER.encode(), b"off")]
        return headers


class Forwarded(Response):
    """A request on its way to an engine, and the answer on its way back.

    An engine that fails before a byte has gone to the client is replaced by another, once: generating has no effect
    but a trace.  One that fails in mid-stream ends the stream with an error event, never with half an event.
    """

    def __init__(self, proxy: Proxy, asked: ClientRequest, held: ExitStack) -> None:
        super().__init__()
        self._proxy = proxy
        self._asked = asked
        self._held = held
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward until done or alone; leaving closes the connection to the engine, which then cancels."""
        with self._held:
            try:
                await while_connected(receive, self._forward(send))
            except ClientDisconnect:
                if not self._started:
                    raise  # counted

    async def _forward(self, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._proxy.forwarding.add(task)
        try:
            await self._answer(send)
        except asyncio.CancelledError:
            if not self._proxy.closing:
                raise
            await self._fail(Overloaded("the server is shutting down"), send)
        except EngineUnavailable as error:
            await self._fail(error, send)
        finally:
            self._proxy.forwarding.discard(task)

    async def _answer(self, send: Send) -> None:
        tried: list[Replica] = []
        while True:
            if (replica := self._proxy.replicas.choose(but=tried)) is None:
                raise Overloaded("no engine is ready")
            tried.append(replica)
            another = len(tried) < 2 and bool(self._proxy.replicas.ready(but=tried))
            try:
                with replica.busy():
                    if await self._from(replica, send, unless_full=another):
                        return
            except httpx.TransportError as error:
                slow = isinstance(error, httpx.ReadTimeout)
                if not slow:
                    replica.found(False, f"failed: {error or type(error).__name__}")
                if self._started or slow or not another:
                    what = "did not answer in time" if slow else "failed"
                    raise EngineUnavailable(f"the engine {what}; try again") from error
            self._proxy.retries.inc()

    async def _from(self, replica: Replica, send: Send, *, unless_full: bool) -> bool:
        """Pass on the answer of one engine; False when it had no place, which another may have."""
        exchange = _exchange(self._asked, replica)
        answer = await self._proxy.send(self._proxy.build(replica, exchange.asked))
        try:
            status, headers = answer.status_code, _without(_OURS, answer.headers.raw)
            try:
                if answer.headers.get("content-type", "").startswith("text/event-stream"):
                    await self._stream(status, headers, exchange.events(whole_events(answer.aiter_raw())), send)
                    return True
                # Read in full first, so that another engine may still take over.
                status, body = exchange.whole(status, b"".join([piece async for piece in answer.aiter_raw()]))
            except Refused as refused:
                status, body = refused.status, refused.body
                headers = [*_without({"content-type"}, headers), (b"content-type", b"application/json")]
            if status == Overloaded.status:
                if unless_full:
                    return False
                headers = [*_without({"retry-after"}, headers), (b"retry-after", b"1")]
            headers.append((b"content-length", b"%d" % len(body)))
            await self._start(status, headers, send)
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return True
        finally:
            await answer.aclose()

    async def _stream(self, status: int, headers: Headers, events: AsyncIterator[bytes], send: Send) -> None:
        """Pass on events as they come.  Raises Refused before anything has gone out."""
        first = await anext(events, b"")
        await self._start(status, headers, send)
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async for following in events:
            await send({"type": "http.response.body", "body": following, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, status: int, headers: Headers, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def _fail(self, error: LivedraftError, send: Send) -> None:
        """Say so in the stream, where one has begun; else by raising it."""
        if not self._started:
            raise error
        event = b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"
        with suppress(OSError):
            await send({"type": "http.response.body", "body": event, "more_body": False})


def _exchange(asked: ClientRequest, replica: Replica) -> Exchange:
    return SglangExchange(asked, replica) if replica.address.kind == "sglang" else AsItIs(asked)


async def whole_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Server-sent events as they come, never half of one: what ends in mid-event is dropped where ``pieces`` raises."""
    held = b""
    async for piece in pieces:
        held += piece
        ends = [at + len(end) for end in (b"\n\n", b"\r\n\r\n") if (at := held.rfind(end)) >= 0]
        if cut := max(ends, default=0):
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _require_plain(path: str) -> None:
    """Raises NotFound for a path that would leave ``/v1`` once it is resolved."""
    if any(part in ("", ".", "..") for part in path.split("/")[1:]):
        raise NotFound(f"{path!r} is not a path of this server")


def _without(names: Collection[str], headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return [(name, value) for name, value in headers if name.decode("latin-1").lower() not in names]
