"""The HTTP endpoint: OpenAI's routes, health, metrics and the engine's administration.

    POST /v1/chat/completions  /v1/completions     GET /v1/models  /v1/models/{id}
    GET  /healthz  /readyz  /metrics               GET /admin/status    POST /admin/drafter

``GET /admin/status`` answers with an EngineStatus, ``POST /admin/drafter`` takes a SwapRequest and answers with a
SwapReceipt, both as JSON.  Knows the engine by its port alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from livedraft.contracts.errors import Overloaded
from livedraft.contracts.messages import Delta, SwapRequest
from livedraft.contracts.ports import Engine
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway import errors
from livedraft.serving.gateway.errors import ModelNotFound
from livedraft.serving.gateway.generations import generations, labels
from livedraft.serving.gateway.keys import TENANT_HEADER, Keys, load_keys, require_admin
from livedraft.serving.gateway.limits import BodyLimit
from livedraft.serving.gateway.metrics import Metrics, Observed
from livedraft.serving.gateway.responses import Answer, ChatRendering, CompletionRendering, Rendering
from livedraft.serving.gateway.schema import UNSUPPORTED, ChatRequest, CompletionRequest, decode
from livedraft.serving.gateway.stream import EventStream, submitted, while_connected
from livedraft.serving.gateway.traffic import Traffic
from livedraft.traces.metrics import StreamCollector
from livedraft.traces.sink import SinkCounters
from prometheus_client.exposition import choose_encoder
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool


def create_app(
    engine: Engine,
    settings: Gateway,
    model_name: str,
    *,
    opted_out: Collection[str] = (),
    environ: Mapping[str, str] = os.environ,
    swapped: Callable[[SwapRequest], None] = lambda _: None,
    stream: Callable[[], SinkCounters] | None = None,
) -> FastAPI:
    """The endpoint in front of ``engine``, which it neither starts nor closes.

    ``opted_out`` are the tenants whose requests are never traced; ``swapped`` hears of every swap that was applied,
    on a thread of its own; ``stream`` counts what became of the traces, for ``/metrics``.  Raises SettingsError for
    an unusable file of keys.
    """
    keys = load_keys(settings.api_keys_file, environ, settings.engine_key)
    endpoint = Endpoint(engine, settings, model_name, keys, opted_out, swapped)
    if stream is not None:
        endpoint.metrics.registry.register(StreamCollector(stream))
    app = FastAPI(title="livedraft", openapi_url=None)
    app.state.endpoint = endpoint
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Observed, metrics=endpoint.metrics)
    errors.install(app)
    for method, path, answer in endpoint.routes:
        app.add_api_route(path, answer, methods=[method])
    return app


class Endpoint:
    """The routes and what they need."""

    def __init__(
        self,
        engine: Engine,
        settings: Gateway,
        model: str,
        keys: Keys,
        opted_out: Collection[str],
        swapped: Callable[[SwapRequest], None],
    ) -> None:
        self.engine = engine
        self.traffic = Traffic()
        self.metrics = Metrics(engine)
        self._settings = settings
        self._model = model
        self._keys = keys
        self._opted_out = frozenset(opted_out)
        self._swapped = swapped
        self._created = int(time.time())
        # Log-probabilities name up to 21 tokens for each one generated: the tokenizer would hold the event loop.
        self._spell = lru_cache(maxsize=1 << 17)(lambda token: engine.decode([token]))

    @property
    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """(method, path, answer)."""
        return [
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.complete),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{model:path}", self.one_model),
            ("GET", "/healthz", self.healthz),
            ("GET", "/readyz", self.readyz),
            ("GET", "/metrics", self.scrape),
            ("GET", "/admin/status", self.status),
            ("POST", "/admin/drafter", self.swap),
        ]

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._answer(request, ChatRequest, ChatRendering(self._spell))

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._answer(request, CompletionRequest, CompletionRendering(self._spell))

    async def models(self, request: Request) -> Response:
        """The one model served."""
        self._tenant(request)
        return _json({"object": "list", "data": [self._card]})

    async def one_model(self, request: Request, model: str) -> Response:
        """That model, by its id."""
        self._tenant(request)
        self._require_model(model)
        return _json(self._card)

    async def healthz(self) -> Response:
        """The process answers."""
        return _json({"status": "ok"})

    async def readyz(self) -> Response:
        """New requests are welcome; 503 while draining or when the engine does not answer."""
        if self.traffic.draining:
            raise Overloaded("the server is shutting down")
        try:
            self.engine.status()
        except Exception as error:  # whatever a dead engine raises, the answer to "ready?" is no
            raise Overloaded(f"the engine does not answer: {error}") from error
        return _json({"status": "ready"})

    async def scrape(self, request: Request) -> Response:
        """Prometheus metrics in the format the scraper prefers."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.metrics.registry), headers={"content-type": content_type})

    async def status(self, request: Request) -> Response:
        """The engine's status."""
        self._require_admin(request)
        return _json(self.engine.status())

    async def swap(self, request: Request) -> Response:
        """Swap the drafter; answers when the engine confirmed, or with why it did not."""
        self._require_admin(request)
        asked = decode(await request.body(), SwapRequest)
        receipt = await run_in_threadpool(self.engine.swap, asked)
        self.metrics.swapped(receipt)
        response = _json(receipt)
        response.background = BackgroundTask(self._swapped, asked)
        return response

    async def close(self) -> None:
        """End what still runs; its clients are told."""
        await run_in_threadpool(self.engine.close, 0.0)

    async def _answer(
        self, request: Request, kind: type[ChatRequest] | type[CompletionRequest], rendering: Rendering
    ) -> Response:
        with ExitStack() as held:
            held.enter_context(self.traffic.admit())
            tenant = self._tenant(request)
            asked = decode(await request.body(), kind, UNSUPPORTED)
            self._require_model(asked.model)
            prompts = await run_in_threadpool(asked.prompts, self.engine)
            answer_id = rendering.prefix + request.state.request_id
            wanted = generations(
                asked,
                prompts,
                labels(asked.metadata, tenant, request.headers, self._opted_out),
                answer_id=answer_id,
                context_length=self.engine.status().context_length,
                settings=self._settings,
            )
            answer = Answer(
                rendering,
                answer_id=answer_id,
                model=self._model,
                created=int(time.time()),
                prompt_tokens=sum(map(len, prompts)),
                choices=len(wanted),
            )
            deltas = self._timed(held.enter_context(submitted(self.engine, wanted)), request.state.started)
            if asked.stream:
                return EventStream(answer.chunks(deltas, asked.includes_usage), held.pop_all())
            return _json(await while_connected(request.receive, answer.whole(deltas)))

    async def _timed(
        self, deltas: AsyncIterator[tuple[int, Delta]], started: float
    ) -> AsyncIterator[tuple[int, Delta]]:
        """``deltas``, noting when the first token came."""
        waiting = True
        async for index, delta in deltas:
            if waiting and delta.tokens:
                self.metrics.first_token_seconds.observe(time.perf_counter() - started)
                waiting = False
            yield index, delta

    def _tenant(self, request: Request) -> str:
        return self._keys.tenant(request.headers.get("authorization"), request.headers.get(TENANT_HEADER))

    def _require_model(self, model: str) -> None:
        if model != self._model:
            raise ModelNotFound(f"model {model!r} does not exist; this server has {self._model!r}")

    def _require_admin(self, request: Request) -> None:
        host = request.client.host if request.client else None
        require_admin(self._settings.admin_key, request.headers.get("authorization"), host)

    @property
    def _card(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "livedraft"}


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
