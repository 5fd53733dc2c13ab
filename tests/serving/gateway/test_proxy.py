"""The gateway in front of engines in other places: real sockets, engines that die, clients that leave."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.cli.ports import free_port
from livedraft.contracts.engines import parse
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.proxy import Proxy, create_proxy, whole_events
from livedraft.serving.gateway.server import DrainingServer, running

from .conftest import Serve
from .fake_engine import FakeEngine
from .test_disconnect import eventually, post
from .test_shutdown import wait_until_ready

CHAT = "/v1/chat/completions"
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Proxied:
    """A running gateway."""

    server: DrainingServer
    http: httpx.Client

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def proxy(self) -> Proxy:
        proxy: Proxy = self.server.config.app.state.endpoint  # type: ignore[union-attr]  # it is our FastAPI
        return proxy

    def busiest(self) -> int:
        return max(replica.in_flight for replica in self.proxy.replicas.all)


@contextmanager
def proxying(
    *engines: str, environ: dict[str, str] | None = None, there: bool = True, **settings: Any
) -> Iterator[Proxied]:
    gateway = Gateway(port=0, **{"health_s": 0.05} | settings)
    app = create_proxy(gateway, parse(",".join(engines)), opted_out=("shy",), environ=environ or {})
    with running(app, gateway) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        served = Proxied(server, http)
        if there:
            eventually(lambda: http.get("/readyz").status_code == 200)
        yield served


Proxying = Callable[..., Proxied]


@pytest.fixture
def proxy() -> Iterator[Proxying]:
    with ExitStack() as stack:
        yield lambda *engines, **settings: stack.enter_context(proxying(*engines, **settings))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def text_of(stream: str) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk.get("choices", ()))


def error_of(stream: str) -> dict[str, Any]:
    last = stream.strip().split("\n\n")[-1]
    error: dict[str, Any] = json.loads(last.removeprefix("data: "))["error"]
    return error


# What clients see.


def test_the_official_client_reads_the_engine_through_it(start: Serve, proxy: Proxying) -> None:
    engine = start()
    served = proxy(engine.url)
    with (
        openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as through,
        openai.OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0) as direct,
    ):
        assert [model.id for model in through.models.list()] == ["fake"]
        ask: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "seed": 3}
        told = direct.chat.completions.create(**ask).choices[0].message.content
        whole = through.chat.completions.create(**ask)
        assert whole.choices[0].message.content == told
        assert whole.usage is not None
        assert whole.usage.model_extra is not None
        assert whole.usage.model_extra["livedraft"]["drafter_version"] == "7"
        stream = list(through.chat.completions.create(**ask, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == told
        with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
            through.chat.completions.create(**ask | {"model": "other"})


def test_a_stream_comes_as_it_is_made(start: Serve, proxy: Proxying, chat: dict[str, Any]) -> None:
    engine = start(FakeEngine(step_s=0.05))
    served = proxy(engine.url)
    with served.http.stream("POST", CHAT, json=chat | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = [(time.monotonic(), piece) for piece in answer.iter_raw()]
    assert len(pieces) > 10
    assert pieces[-1][0] - pieces[0][0] > 0.5
    assert all(piece.endswith(b"\n\n") for _, piece in pieces)


def test_headers_and_ids_pass_both_ways(start: Serve, proxy: Proxying, chat: dict[str, Any]) -> None:
    engine = start()
    served = proxy(engine.url)
    answer = served.http.post(CHAT, json=chat, headers={"x-livedraft-domain": "poetry", "x-livedraft-trace": "off"})
    [asked] = engine.engine.submitted
    assert (asked.domain, asked.traced, asked.tenant) == ("poetry", False, "default")
    assert answer.json()["id"] == "chatcmpl-" + answer.headers["x-request-id"]
    assert len(answer.headers.get_list("date")) == 1


def test_engine_errors_pass_as_they_are(start: Serve, proxy: Proxying, chat: dict[str, Any]) -> None:
    engine = start()
    served = proxy(engine.url)
    for body in (chat | {"temperature": -1}, chat | {"tools": [1]}):
        direct, through = engine.http.post(CHAT, json=body), served.http.post(CHAT, json=body)
        assert (through.status_code, through.json()) == (direct.status_code, direct.json())


# Keys, tenants, limits.


def test_the_tenant_of_a_key_reaches_an_engine_that_shares_the_secret(
    start: Serve, proxy: Proxying, chat: dict[str, Any]
) -> None:
    engine = start(engine_key="between us")
    served = proxy(engine.url, environ={"LIVEDRAFT_API_KEYS": "sk-a:acmé,sk-s:shy"}, engine_key="between us")
    assert served.http.post(CHAT, json=chat).status_code == 401
    for key in ("sk-a", "sk-s"):
        lies = {"authorization": f"Bearer {key}", "x-livedraft-tenant": "other", "x-livedraft-trace": "on"}
        assert served.http.post(CHAT, json=chat, headers=lies).status_code == 200
    assert [(asked.tenant, asked.traced) for asked in engine.engine.submitted] == [("acmé", True), ("shy", False)]


def test_an_engine_believes_nobody_else(start: Serve, chat: dict[str, Any]) -> None:
    claim = {"x-livedraft-tenant": "acme"}
    with_secret = start(engine_key="between us")
    assert with_secret.http.post(CHAT, json=chat, headers=claim).status_code == 401
    wrong = claim | {"authorization": "Bearer guess"}
    assert with_secret.http.post(CHAT, json=chat, headers=wrong).status_code == 401
    without = start()
    assert without.http.post(CHAT, json=chat, headers=wrong).status_code == 200
    own_keys = start(environ={"LIVEDRAFT_API_KEYS": "sk-b:bell"}, engine_key="between us")
    assert own_keys.http.post(CHAT, json=chat, headers=claim | {"authorization": "Bearer sk-b"}).status_code == 200
    assert [asked.tenant for asked in without.engine.submitted + own_keys.engine.submitted] == ["default", "bell"]


def test_opting_out_holds_also_where_the_engine_learns_no_tenant(
    start: Serve, proxy: Proxying, chat: dict[str, Any]
) -> None:
    engine = start()
    served = proxy(engine.url, environ={"LIVEDRAFT_API_KEYS": "sk-s:shy"})
    served.http.post(CHAT, json=chat, headers={"authorization": "Bearer sk-s", "x-livedraft-trace": "on"})
    assert [asked.traced for asked in engine.engine.submitted] == [False]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"max_tokens": 33}, 400, "max_tokens"),
        ({"max_completion_tokens": 33}, 400, "max_completion_tokens"),
        ({"n": 3}, 400, "n"),
        ({"n": "many"}, 400, "n"),
        ({"pad": "x" * 3000}, 413, None),
    ],
)
def test_limits_are_the_gateways_own(
    start: Serve, proxy: Proxying, chat: dict[str, Any], change: dict[str, Any], status: int, param: str | None
) -> None:
    engine = start()
    served = proxy(engine.url, max_tokens_limit=32, max_choices=2, max_body_bytes=2000)
    answer = served.http.post(CHAT, json=chat | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert engine.engine.submitted == []


@pytest.mark.parametrize("path", ["/admin/status", "/v1/../admin/status", "/v1/%2e%2e/admin/status", "/v1//admin"])
def test_administration_is_out_of_reach(start: Serve, proxy: Proxying, path: str) -> None:
    served = proxy(start().url)
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 404")


# Several engines, some of which fail.


def test_the_engine_with_least_to_do_is_asked(
    pool: ThreadPoolExecutor, start: Serve, proxy: Proxying, chat: dict[str, Any]
) -> None:
    engines = [start(FakeEngine(stalled=True)) for _ in range(3)]
    served = proxy(*(engine.url for engine in engines), drain_s=0.1)
    for _ in range(12):
        pool.submit(httpx.post, served.url + CHAT, json=chat, timeout=20)
    eventually(lambda: sum(len(engine.engine.submitted) for engine in engines) == 12)
    assert [len(engine.engine.submitted) for engine in engines] == [4, 4, 4]
    text = served.http.get("/metrics").text
    for engine in engines:
        assert f'livedraft_replica_up{{replica="{engine.url}"}} 1.0' in text
        assert f'livedraft_replica_in_flight_requests{{replica="{engine.url}"}} 4.0' in text


def test_a_full_engine_is_passed_over_once(start: Serve, proxy: Proxying, chat: dict[str, Any]) -> None:
    full, free = start(FakeEngine(capacity=0)), start()
    served = proxy(full.url, free.url)
    assert [served.http.post(CHAT, json=chat).status_code for _ in range(6)] == [200] * 6
    alone = proxy(full.url)
    answer = alone.http.post(CHAT, json=chat)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


def test_without_an_engine_the_gateway_says_so(proxy: Proxying, chat: dict[str, Any]) -> None:
    served = proxy(f"http://127.0.0.1:{free_port()}", there=False)
    answer = served.http.post(CHAT, json=chat)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert served.http.get("/readyz").status_code == 503
    assert served.http.get("/healthz").status_code == 200


ENGINE = """
import sys
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.app import create_app
from livedraft.serving.gateway.server import serve
from tests.serving.gateway.fake_engine import FakeEngine

settings = Gateway(port=int(sys.argv[1]))
serve(create_app(FakeEngine(step_s=float(sys.argv[2]), length=300), settings, "fake"), settings)
"""


@contextmanager
def engine_process(step_s: float, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = port or free_port()
    with subprocess.Popen([sys.executable, "-c", ENGINE, str(port), str(step_s)], cwd=ROOT) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()


def test_an_engine_killed_in_mid_stream_ends_that_stream_with_an_error_and_the_next_goes_elsewhere(
    start: Serve, proxy: Proxying, chat: dict[str, Any], pool: ThreadPoolExecutor
) -> None:
    with engine_process(0.05) as (url, process):
        served = proxy(url, health_s=60)
        spare = start()
        with served.http.stream("POST", CHAT, json=chat | {"stream": True, "max_tokens": 300}) as answer:
            received = ""
            for piece in answer.iter_text():
                received += piece
                if received.count("data: ") == 5:
                    process.send_signal(signal.SIGKILL)
        assert text_of(received)
        assert error_of(received)["code"] == "engine_unavailable"
        assert "[DONE]" not in received
        with pytest.raises(openai.APIError, match="no engine is ready"):
            openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0).models.list()
        both = proxy(spare.url, url, health_s=60)
        assert both.http.post(CHAT, json=chat).status_code == 200


def test_an_engine_killed_before_it_answered_is_replaced_by_the_other(
    start: Serve, proxy: Proxying, chat: dict[str, Any], pool: ThreadPoolExecutor
) -> None:
    with engine_process(60) as (url, process):
        served = proxy(url, health_s=0.05)
        spare = start()
        both = proxy(url, spare.url, health_s=0.5)
        eventually(lambda: all(replica.ready for replica in both.proxy.replicas.all))
        answers = [pool.submit(httpx.post, both.url + CHAT, json=chat, timeout=30) for _ in range(4)]
        alone = pool.submit(httpx.post, served.url + CHAT, json=chat, timeout=30)
        eventually(lambda: both.proxy.replicas.all[0].in_flight > 0)
        eventually(lambda: served.busiest() == 1)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert [answer.result().status_code for answer in answers] == [200] * 4
        failed = alone.result()
        assert (failed.status_code, failed.json()["error"]["code"]) == (502, "engine_unavailable")
        assert "livedraft_retries_total 0.0" not in both.http.get("/metrics").text
        assert both.http.post(CHAT, json=chat).status_code == 200


def test_an_engine_that_comes_late_is_asked(proxy: Proxying, chat: dict[str, Any]) -> None:
    port = free_port()
    served = proxy(f"http://127.0.0.1:{port}", there=False)
    assert served.http.post(CHAT, json=chat).status_code == 503
    with engine_process(0.001, port):
        wait_until_ready(served.url)
        assert served.http.post(CHAT, json=chat).status_code == 200


def test_an_engine_that_says_nothing_is_given_up(start: Serve, proxy: Proxying, chat: dict[str, Any]) -> None:
    engine = start(FakeEngine(stalled=True), drain_s=0.1)
    served = proxy(engine.url, engine_timeout_s=0.3)
    answer = served.http.post(CHAT, json=chat)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_unavailable")
    assert "in time" in answer.json()["error"]["message"]
    eventually(lambda: len(engine.engine.cancelled) == 1)


# Leaving and ending.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_at_the_engine(
    start: Serve, proxy: Proxying, chat: dict[str, Any], stream: bool
) -> None:
    engine = start(FakeEngine(step_s=0.02, length=400))
    served = proxy(engine.url)
    client = post(served, chat | {"stream": stream, "max_tokens": 400})  # type: ignore[arg-type]  # has a url
    eventually(lambda: len(engine.engine.submitted) == 1)
    client.close()
    eventually(lambda: len(engine.engine.cancelled) == 1)
    eventually(lambda: served.proxy.traffic.in_flight == 0 and served.busiest() == 0)
    assert served.proxy.forwarding == set()


def test_running_requests_are_answered_before_it_ends(
    start: Serve, chat: dict[str, Any], pool: ThreadPoolExecutor
) -> None:
    engine = start(FakeEngine(step_s=0.03))
    with proxying(engine.url) as served:
        whole = pool.submit(httpx.post, served.url + CHAT, json=chat, timeout=20)
        streamed = pool.submit(httpx.post, served.url + CHAT, json=chat | {"stream": True}, timeout=20)
        eventually(lambda: len(engine.engine.submitted) == 2)
        served.server.should_exit = True
        eventually(lambda: served.http.get("/readyz").status_code == 503)
        assert served.http.post(CHAT, json=chat).status_code == 503
    assert whole.result().json()["usage"]["completion_tokens"] == 60
    assert streamed.result().text.endswith("data: [DONE]\n\n")


def test_what_outlasts_the_drain_is_told(start: Serve, chat: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    stuck, slow = start(FakeEngine(stalled=True), drain_s=0.1), start(FakeEngine(step_s=0.05, length=500))
    with proxying(stuck.url, drain_s=0.2) as one, proxying(slow.url, drain_s=0.2) as two:
        whole = pool.submit(httpx.post, one.url + CHAT, json=chat, timeout=20)
        streaming = chat | {"stream": True, "max_tokens": 500}
        streamed = pool.submit(httpx.post, two.url + CHAT, json=streaming, timeout=20)
        eventually(lambda: len(stuck.engine.submitted) == 1 and slow.engine.rounds > 2)
    assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "overloaded")
    assert error_of(streamed.result().text)["message"] == "the server is shutting down"
    eventually(lambda: len(stuck.engine.cancelled) == 1 and len(slow.engine.cancelled) == 1)


@given(st.lists(st.integers(1, 9), max_size=30), st.booleans(), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_events_pass_whole_however_they_are_cut(cuts: list[int], torn: bool, end: bytes) -> None:
    stream = end.join(b"data: %d" % number * (number % 3 + 1) for number in range(9)) + end + b"data: to"
    pieces, at = [], 0
    for cut in [*cuts, len(stream)]:
        pieces.append(stream[at : at + cut])
        at += cut

    async def source() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if torn:
            raise EOFError

    async def collect() -> list[bytes]:
        got: list[bytes] = []
        try:
            async for events in whole_events(source()):
                got.append(events)
        except EOFError:
            assert torn
        return got

    got = asyncio.run(collect())
    assert b"".join(got) == (stream.removesuffix(b"data: to") if torn else stream)
    assert all(events.endswith(end) for events in (got if torn else got[:-1]))


def test_the_process_serves_without_torch_and_ends_on_sigterm(start: Serve, chat: dict[str, Any]) -> None:
    engine = start()
    port = free_port()
    program = "from livedraft.cli.main import app; import sys; app(['gateway'], standalone_mode=False)\n"
    program += "assert 'torch' not in sys.modules; print('light')"
    environment = {"LIVEDRAFT_ENGINE__URL": engine.url, "LIVEDRAFT_GATEWAY__PORT": str(port), "PATH": ""}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_until_ready(f"http://127.0.0.1:{port}")
        assert httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=chat).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout
        assert process.stdout.read().endswith("light\n")


def test_many_at_once(start: Serve, proxy: Proxying, chat: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    engines = [start() for _ in range(2)]
    served = proxy(*(engine.url for engine in engines))
    lock = threading.Lock()
    texts: list[str] = []

    def ask() -> None:
        answer = httpx.post(served.url + CHAT, json=chat | {"stream": True}, timeout=20)
        with lock:
            texts.append(text_of(answer.text))

    for future in [pool.submit(ask) for _ in range(60)]:
        future.result()
    assert len(texts) == 60
    assert len(set(texts)) == 1
    eventually(lambda: served.busiest() == 0)
