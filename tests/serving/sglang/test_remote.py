"""How an SGLang without the plugin is asked: by which key, and by whom what.  tests/sglang swaps in a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from livedraft.cli.wiring import engine_admin, swapper
from livedraft.contracts.errors import SwapFailed
from livedraft.contracts.ports import EngineAdmin
from livedraft.contracts.settings import Engine, Gateway, Settings, Swap
from livedraft.serving.local import place
from livedraft.swap.memory_registry import MemoryRegistry

TARGET = place.find("bundled")


class FakeSglang:
    """Its routes, as far as a status and what comes before a swap need them; the keys are SGLang's options."""

    def __init__(self, api_key: str | None = None, admin_api_key: str | None = None) -> None:
        self.answered: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(api_key)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(admin_api_key or api_key)

            def answer(self, key: str | None) -> None:
                allowed = key is None or self.headers["Authorization"] == f"Bearer {key}"
                body = {"model_path": str(TARGET), "context_length": 512, "weight_version": "default"}
                self.send_response(200 if allowed else 401)
                self.end_headers()
                self.wfile.write(json.dumps(body if allowed else {"error": "Unauthorized"}).encode())
                if allowed:
                    outer.answered.append(self.path)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"sglang+http://127.0.0.1:{self._server.server_port}?plugin=no"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def fake(**keys: str) -> Iterator[FakeSglang]:
    server = FakeSglang(**keys)
    try:
        yield server
    finally:
        server.close()


LOOKED = ["/server_info", "/model_info"]
RELEASED = ["/end_weight_update", "/continue_generation"]


@pytest.mark.parametrize(
    "keys", [{}, {"api_key": "between"}, {"admin_api_key": "admin"}, {"api_key": "between", "admin_api_key": "admin"}]
)
def test_whoever_swaps_lets_go_once_of_what_one_before_may_hold(keys: dict[str, str], tmp_path: Path) -> None:
    with fake(**keys) as sglang:
        settings = Settings(
            engine=Engine(url=sglang.url),
            gateway=Gateway(engine_key="between", admin_key="admin"),
            swap=Swap(folder=str(tmp_path / "swap")),
        )
        admin: EngineAdmin = swapper(settings, MemoryRegistry(tmp_path / "registry")).engine
        status = admin.status()
        assert (status.engine, status.target_revision) == ("sglang", place.revision(TARGET))
        assert "without the plugin" in status.disabled["capture"]
        assert sglang.answered == [*LOOKED, *RELEASED]
        admin.status()
        assert sglang.answered[4:] == LOOKED


def test_whoever_looks_ends_nobody_s_swap() -> None:
    with fake() as sglang:
        assert engine_admin(Settings(engine=Engine(url=sglang.url))).status().context_length == 512
        assert sglang.answered == LOOKED


def test_a_wrong_key_is_told_with_its_status() -> None:
    with fake(api_key="between") as sglang:
        settings = Settings(engine=Engine(url=sglang.url), gateway=Gateway(engine_key="other"))
        with pytest.raises(SwapFailed, match="server_info: 401"):
            engine_admin(settings).status()


def test_an_environment_that_cannot_read_the_target_is_told_what_it_lacks() -> None:
    code = """
import sys
sys.modules["transformers"] = None
from livedraft.cli.wiring import engine_admin
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.settings import Engine, Settings
try:
    engine_admin(Settings(engine=Engine(url="sglang+http://127.0.0.1:1?plugin=no")))
except SettingsError as error:
    assert "engine.url: ?plugin=no needs transformers in this environment" in str(error), error
else:
    raise AssertionError("nothing was said")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
