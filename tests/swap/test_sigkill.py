"""A real controller process, a real MLflow server, an engine over HTTP, and SIGKILL around the swap."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from livedraft.contracts.errors import SwapFailed
from livedraft.contracts.messages import SwapReceipt, SwapRequest
from livedraft.swap.mlflow_registry import MlflowRegistry
from livedraft.swap.mlflow_server import MlflowServer

from . import drafts
from .engine_server import EngineServer
from .fakes import FakeEngine

ROOT = Path(__file__).parents[2]


class DeadlyEngine(FakeEngine):
    """Kills who asks for a swap: "before" it takes effect, "after", or not at all (None)."""

    victim: int
    moment: str | None = None

    def swap(self, request: SwapRequest) -> SwapReceipt:
        if self.moment == "before":
            os.kill(self.victim, signal.SIGKILL)
            raise SwapFailed("nobody is left to hear this")
        receipt = super().swap(request)
        if self.moment == "after":
            os.kill(self.victim, signal.SIGKILL)
        return receipt


def eventually(condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_controller_killed_at_the_swap_leaves_one_version_live(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    registry = MlflowRegistry(mlflow_server.url, f"drafter-{uuid.uuid4().hex[:8]}")
    for seed in (1, 2):
        registry.publish(tmp_path / str(seed), drafts.write(tmp_path / str(seed), seed), {})
    registry.point("candidate", "2")
    engine = DeadlyEngine(tmp_path / "1", "1")
    with EngineServer(engine) as server:
        given = {
            "registry": mlflow_server.url,
            "model": registry.model,
            "engine": server.url,
            "folder": str(tmp_path / "swap"),
            "accept_length": {"1": 2.0, "2": 3.0},
        }

        def start() -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "tests.swap.controller_process", json.dumps(given)]
            return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

        for moment, drafter in (("before", "1"), ("after", "2")):
            engine.moment = moment
            killed = start()
            engine.victim = killed.pid
            assert killed.wait(60) == -signal.SIGKILL
            assert engine.drafter == drafter
            live = registry.resolve("live")
            assert live is not None
            assert live.version == "1"  # aliases never run ahead of the engine's confirmation

        engine.moment = None
        survivor = start()
        try:
            eventually(lambda: (v := registry.resolve("live")) is not None and v.version == "2", "live: version 2")
            engine.serve(100, 3.0)
            eventually(lambda: len(registry.decisions()) == 2, "two decisions")
        finally:
            survivor.terminate()
            survivor.wait(30)
        assert engine.drafter == "2"
        assert [(d.action, d.candidate) for d in registry.decisions()] == [("promote", "2"), ("keep", "2")]
        assert registry.get("1").aliases == ("previous",)
        assert registry.get("2").aliases == ("candidate", "live")
