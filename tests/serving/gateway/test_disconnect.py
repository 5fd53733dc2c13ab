"""A client that leaves stops what it asked for; real sockets, closed in the middle."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import Serve, Served
from .fake_engine import FakeEngine


def post(served: Served, fields: dict[str, Any]) -> socket.socket:
    """Send a chat request and leave the answer unread."""
    address = urlsplit(served.url)
    client = socket.create_connection((address.hostname, address.port), timeout=10)
    body = json.dumps(fields).encode()
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return client


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "did not happen within 10 s"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stalled", [False, True], ids=["decoding", "stalled"])
def test_leaving_cancels_every_choice(start: Serve, chat: dict[str, Any], stream: bool, stalled: bool) -> None:
    served = start(FakeEngine(step_s=0.02, stalled=stalled, length=400))
    client = post(served, chat | {"n": 3, "stream": stream})
    eventually(lambda: len(served.engine.submitted) == 3)
    client.close()
    eventually(lambda: len(served.engine.cancelled) == 3)
    assert set(served.engine.cancelled) == {request.request_id for request in served.engine.submitted}
    eventually(lambda: served.in_flight == 0)


def test_leaving_after_some_chunks(start: Serve, chat: dict[str, Any]) -> None:
    served = start(FakeEngine(step_s=0.02, length=400))
    client = post(served, chat | {"stream": True})
    received = b""
    while received.count(b"data: ") < 5:
        received += client.recv(4096)
    client.close()
    eventually(lambda: len(served.engine.cancelled) == 1)
    assert served.engine.rounds < 400 / 3


def test_leaving_before_the_body_is_complete_asks_nothing(start: Serve) -> None:
    served = start()
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
        eventually(lambda: served.in_flight == 1)
    eventually(lambda: served.in_flight == 0)
    assert served.engine.submitted == []
    assert 'status="499"' in served.http.get("/metrics").text


def test_others_are_not_disturbed(start: Serve, chat: dict[str, Any]) -> None:
    served = start(FakeEngine(step_s=0.005, length=400))
    leaver = post(served, chat | {"stream": True, "max_tokens": 400})
    eventually(lambda: len(served.engine.submitted) == 1)
    with served.http.stream("POST", "/v1/chat/completions", json=chat | {"stream": True, "max_tokens": 60}) as response:
        leaver.close()
        events = response.read().decode()
    assert events.endswith("data: [DONE]\n\n")
    eventually(lambda: served.engine.cancelled == [served.engine.submitted[0].request_id])


def test_a_finished_request_is_not_cancelled(start: Serve, chat: dict[str, Any]) -> None:
    served = start()
    for stream in (False, True):
        assert served.http.post("/v1/chat/completions", json=chat | {"stream": stream}).status_code == 200
    assert served.engine.cancelled == []
