"""The administration in a scheduler's process, asked as the swap controller asks it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import pytest
from livedraft.contracts.errors import DrafterRejected, Overloaded, SwapFailed
from livedraft.contracts.messages import EngineStatus, SwapReceipt, SwapRequest
from livedraft.serving.sglang.admin import AdminServer
from livedraft.swap.engine_admin import HttpEngineAdmin

STATUS = EngineStatus(
    engine="sglang",
    target="t",
    target_revision="r",
    tokenizer_hash="h",
    context_length=128,
    drafter="3",
    drafter_checksum="sum",
    running=1,
    waiting=2,
    output_tokens=3,
    rounds=4,
    by_stratum={"3": {"default/greedy": (8, 4)}},
    capture=False,
    disabled={"capture": "SGLang 9.9 has no forward_batch_generation any more"},
)
REQUEST = SwapRequest(path="/drafters/4", version="4", checksum="other")
RECEIPT = SwapReceipt(version="4", checksum="other", previous="3", applied_at=1.0, stall_s=0.001)


class FakeEngine:
    def __init__(self) -> None:
        self.asked: list[SwapRequest] = []
        self.error: Exception | None = None

    def status(self) -> EngineStatus:
        if self.error:
            raise self.error
        return STATUS

    def swap(self, request: SwapRequest) -> SwapReceipt:
        self.asked.append(request)
        if self.error:
            raise self.error
        return RECEIPT


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(engine: FakeEngine, request: pytest.FixtureRequest) -> Iterator[AdminServer]:
    server = AdminServer(request.param, 0, None, engine.status, engine.swap)
    yield server
    server.close()


@pytest.fixture
def guarded(engine: FakeEngine) -> Iterator[AdminServer]:
    server = AdminServer("127.0.0.1", 0, "secret", engine.status, engine.swap)
    yield server
    server.close()


def admin(server: AdminServer, key: str | None = None) -> HttpEngineAdmin:
    host = server.host if ":" not in server.host else f"[{server.host}]"
    return HttpEngineAdmin(f"http://{host}:{server.port}", key)


def ask(server: AdminServer, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content["error"]


def test_status_and_swap(server: AdminServer, engine: FakeEngine) -> None:
    assert admin(server).status() == STATUS
    assert admin(server).swap(REQUEST) == RECEIPT
    assert engine.asked == [REQUEST]


@pytest.mark.parametrize("error", [DrafterRejected("tensor fc.weight: NaN or infinity"), SwapFailed("another swap")])
def test_refusals_arrive_as_what_they_are(server: AdminServer, engine: FakeEngine, error: Exception) -> None:
    engine.error = error
    with pytest.raises(type(error), match=str(error)):
        admin(server).swap(REQUEST)


def test_an_engine_that_starts_is_a_failed_answer(server: AdminServer, engine: FakeEngine) -> None:
    engine.error = Overloaded("this engine is starting")
    with pytest.raises(SwapFailed, match="503 this engine is starting"):
        admin(server).status()


def test_a_bug_of_ours_tells_the_client_nothing_and_kills_nothing(server: AdminServer, engine: FakeEngine) -> None:
    engine.error = ZeroDivisionError("private")
    assert ask(server, "GET", "/admin/status")[0] == 500
    engine.error = None
    assert admin(server).status() == STATUS


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/admin/drafter", b"{", 400, "not JSON"),
        ("POST", "/admin/drafter", b'{"path": "/x", "version": 3, "checksum": "c"}', 400, "version: Expected `str`"),
        ("POST", "/admin/drafter", b'{"path": "/x", "version": "3"}', 400, "checksum: is required"),
        ("POST", "/admin/drafter", b" " * 70000, 413, "the limit is 65536"),
        ("GET", "/admin/drafter", b"", 404, "the routes are"),
        ("POST", "/v1/completions", b"", 404, "the routes are"),
    ],
)
def test_wrong_requests(
    server: AdminServer, engine: FakeEngine, method: str, path: str, body: bytes, status: int, message: str
) -> None:
    found, error = ask(server, method, path, body)
    assert found == status
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not engine.asked


def test_the_key_is_asked_for_everywhere(guarded: AdminServer, engine: FakeEngine) -> None:
    assert admin(guarded, "secret").swap(REQUEST) == RECEIPT
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        for method, path in (("GET", "/admin/status"), ("POST", "/admin/drafter")):
            status, error = ask(guarded, method, path, b"{}", **headers)
            assert (status, error["code"]) == (401, "invalid_api_key")
    assert engine.asked == [REQUEST]


def test_a_taken_port_is_an_error_to_whoever_starts_it(server: AdminServer, engine: FakeEngine) -> None:
    with pytest.raises(OSError, match="in use"):
        AdminServer(server.host, server.port, None, engine.status, engine.swap)
