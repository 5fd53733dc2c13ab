"""Shutting down: what runs is answered, what comes is refused, the engine is closed, the process ends cleanly."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from livedraft.cli.ports import free_port
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.server import listen

from .conftest import Serve
from .fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
ROOT = Path(__file__).parents[3]
#: 60 tokens in rounds of 3: an answer takes about a second.
SLOW_S = 0.05


def wait_until_running(engine: FakeEngine, requests: int = 1) -> None:
    while engine.status().running < requests:
        time.sleep(0.005)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_running_requests_are_answered_in_full(start: Serve, chat: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    served = start(FakeEngine(step_s=SLOW_S))
    whole = pool.submit(httpx.post, served.url + CHAT, json=chat, timeout=20)
    streamed = pool.submit(httpx.post, served.url + CHAT, json=chat | {"stream": True}, timeout=20)
    wait_until_running(served.engine, 2)
    served.server.should_exit = True
    assert whole.result().json()["usage"]["completion_tokens"] == 60
    assert streamed.result().text.endswith("data: [DONE]\n\n")
    assert served.engine.cancelled == []


def test_meanwhile_the_server_says_that_it_is_leaving(
    start: Serve, chat: dict[str, Any], pool: ThreadPoolExecutor
) -> None:
    served = start(FakeEngine(step_s=SLOW_S))
    assert served.http.get("/readyz").status_code == 200
    running = pool.submit(httpx.post, served.url + CHAT, json=chat, timeout=20)
    wait_until_running(served.engine)
    served.server.should_exit = True
    while (ready := served.http.get("/readyz")).status_code == 200:
        time.sleep(0.01)
    assert ready.status_code == 503
    assert ready.headers["retry-after"] == "1"
    refused = served.http.post(CHAT, json=chat)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert served.http.get("/healthz").status_code == 200
    assert running.result().status_code == 200


def test_what_outlasts_the_drain_is_told(start: Serve, chat: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    served = start(FakeEngine(stalled=True), drain_s=0.1)
    whole = pool.submit(httpx.post, served.url + CHAT, json=chat, timeout=20)
    streamed = pool.submit(httpx.post, served.url + CHAT, json=chat | {"stream": True}, timeout=20)
    wait_until_running(served.engine, 2)
    served.server.should_exit = True
    assert whole.result().status_code == 503
    assert "the server is shutting down" in streamed.result().text
    assert "[DONE]" not in streamed.result().text


def test_an_idle_server_stops_at_once_and_closes_the_engine(start: Serve) -> None:
    served = start(drain_s=60)
    served.server.should_exit = True
    while not served.engine.closed:
        time.sleep(0.01)


PROGRAM = """
import sys
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.app import create_app
from livedraft.serving.gateway.server import serve
from tests.serving.gateway.fake_engine import FakeEngine

class Engine(FakeEngine):
    def submit(self, request, emit):
        super().submit(request, emit)
        print("submitted", flush=True)

    def close(self, timeout=10.0):
        super().close(timeout)
        print("closed", flush=True)

settings = Gateway(port=int(sys.argv[1]), drain_s=20)
serve(create_app(Engine(step_s=float(sys.argv[2]), length=60), settings, "fake"), settings)
print("returned", flush=True)
"""


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if httpx.get(url + "/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_stream_end_and_the_program_go_on(
    chat: dict[str, Any], pool: ThreadPoolExecutor, number: signal.Signals
) -> None:
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, str(port), str(SLOW_S)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        wait_until_ready(f"http://127.0.0.1:{port}")
        running = pool.submit(httpx.post, f"http://127.0.0.1:{port}{CHAT}", json=chat | {"stream": True}, timeout=20)
        assert process.stdout.readline() == "submitted\n"
        process.send_signal(number)
        assert running.result().text.endswith("data: [DONE]\n\n")
        assert process.stdout.read().split() == ["closed", "returned"]
        assert process.wait(20) == 0


def test_a_second_signal_ends_the_drain(chat: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port), "3600"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        wait_until_ready(f"http://127.0.0.1:{port}")
        running = pool.submit(httpx.post, f"http://127.0.0.1:{port}{CHAT}", json=chat, timeout=60)
        assert process.stdout.readline() == "submitted\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert running.result().status_code == 503


def test_an_address_in_use_is_named() -> None:
    with listen(Gateway(port=0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"cannot listen on 127.0.0.1:{port}: .*in use"):
            listen(Gateway(port=port))


@pytest.mark.parametrize("settings", [Gateway(host="no.such.host.invalid"), Gateway(port=70000)])
def test_an_address_that_cannot_be_is_named(settings: Gateway) -> None:
    with pytest.raises(SettingsError, match=f"{settings.host}:{settings.port}"):
        listen(settings)
