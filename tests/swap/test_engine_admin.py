"""The HTTP adapter against a real server, well-behaved and not."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import SwapRequest
from livedraft.swap.engine_admin import HttpEngineAdmin

from . import drafts
from .engine_server import EngineServer
from .fakes import FakeEngine


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    drafts.write(tmp_path / "a", 0)
    return FakeEngine(tmp_path / "a", "1")


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[EngineServer]:
    with EngineServer(engine, admin_key="secret") as server:
        yield server


def test_status_and_swap(engine: FakeEngine, server: EngineServer, tmp_path: Path) -> None:
    admin = HttpEngineAdmin(server.url + "/", "secret")
    engine.serve(10, 2.5)
    assert admin.status() == engine.status()
    checksum = checkpoint.checksum(drafts.write(tmp_path / "b", 1).tensors)
    receipt = admin.swap(SwapRequest(path=str(tmp_path / "b"), version="2", checksum=checksum))
    assert (receipt.version, receipt.checksum, receipt.previous) == ("2", checksum, "1")
    assert admin.status().drafter == "2"


def test_a_refused_drafter_is_rejected_with_the_engines_words(engine: FakeEngine, server: EngineServer) -> None:
    engine.refuses.add("2")
    with pytest.raises(DrafterRejected, match=r"^version 2: not for me$"):
        HttpEngineAdmin(server.url, "secret").swap(SwapRequest(path="/x", version="2", checksum="c"))


def test_any_other_refusal_is_a_failed_swap(engine: FakeEngine, server: EngineServer) -> None:
    with pytest.raises(SwapFailed, match="401 wrong key"):
        HttpEngineAdmin(server.url).status()
    engine.broken = True
    with pytest.raises(SwapFailed, match="409 the engine does not answer"):
        HttpEngineAdmin(server.url, "secret").status()


def test_nobody_there(closed_url: str) -> None:
    with pytest.raises(SwapFailed, match="/admin/status"):
        HttpEngineAdmin(closed_url).status()


def test_nobody_answering_is_given_up_in_time(silent_server: str) -> None:
    began = time.monotonic()
    with pytest.raises(SwapFailed, match="timed out"):
        HttpEngineAdmin(silent_server, timeout=0.3).status()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"{}"), (200, b"<html>"), (500, b"<html>"), (500, b"{}"), (502, b""), (204, b"")],
)
def test_nonsense_is_a_failed_swap(status: int, body: bytes) -> None:
    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nonsense) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            with pytest.raises(SwapFailed):
                HttpEngineAdmin(f"http://127.0.0.1:{server.server_port}").status()
        finally:
            server.shutdown()


def test_proxies_of_the_environment_are_not_used(server: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert HttpEngineAdmin(server.url, "secret").status().drafter == "1"
