"""The whole loop around a real SGLang server: gateway, relay, trainer, controller and registry.

They are processes of the project's own environment, named by LIVEDRAFT_PYTHON, as they would be in production: SGLang's
environment has the plugin and little else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from livedraft.cli.ports import free_port
from livedraft.cli.settings_file import write_settings
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.contracts.settings import Gateway, Registry, Relay, Settings, Swap, Traces, Trainer
from livedraft.swap.mlflow_server import ENVIRONMENT, MlflowServer

from .plugged import Engine, engine
from .server import Speculation

#: In the order in which they end.
PROCESSES = ("controller", "trainer", "gateway", "relay")
_START_S = 180.0
_STOP_S = 60.0


@dataclass
class Loop:
    """A running loop."""

    folder: Path
    settings: Settings
    engine: Engine
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    #: Where the controller says that it runs.
    health: int = field(default_factory=free_port)

    @property
    def config(self) -> Path:
        """What all of them read."""
        return self.folder / "livedraft.toml"

    @property
    def url(self) -> str:
        """The gateway's."""
        return f"http://127.0.0.1:{self.settings.gateway.port}"

    @property
    def drafter(self) -> str:
        """Version that the server drafts with."""
        return self.engine.admin.status().drafter

    def start(self, *names: str) -> None:
        """Start processes, again where they were killed."""
        for name in names:
            ours = {"LIVEDRAFT_METRICS__PORT": str(self.health)} if name == "controller" else {}
            self._spawn(name, ["-m", "livedraft.cli.main", name, "--config", str(self.config)], **ours)

    @contextlib.contextmanager
    def uncontrolled(self) -> Iterator[None]:
        """Nobody swaps but the block: the controller has ended what it had under way, and runs again afterwards."""
        assert self.stop("controller") == 0, self.log("controller")
        try:
            yield
        finally:
            self.start("controller")
            self.eventually(lambda: _answers(f"http://127.0.0.1:{self.health}/healthz"), _START_S)

    def start_registry(self) -> None:
        """Start MLflow and wait for it."""
        server = MlflowServer(self.settings.registry)
        server.folder.mkdir(parents=True, exist_ok=True)
        self._spawn("mlflow", server.command[1:])
        self.eventually(lambda: server.healthy, _START_S)

    def kill(self, name: str) -> None:
        """SIGKILL."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # MLflow has workers
        process.wait()

    def stop(self, name: str) -> int:
        """SIGTERM; the status it ends with."""
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(_STOP_S)

    def log(self, name: str) -> str:
        """The end of what a process said."""
        return "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-30:])

    def eventually(self, condition: Callable[[], bool], within_s: float) -> None:
        """Wait for it; a process that ends by itself, or a time that passes, is an error with the logs."""
        deadline = time.monotonic() + within_s
        while not condition():
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended:\n{self.log(name)}"
            assert time.monotonic() < deadline, "\n".join(
                f"--- {name}\n{self.log(name)}" for name in self.processes if name != "mlflow"
            )
            time.sleep(0.3)

    def ask(self, prompt: str) -> dict[str, Any]:
        """The answer to a greedy completion.  Raises httpx.HTTPError."""
        body = {"prompt": prompt, "model": "tiny", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        answer.raise_for_status()
        return dict(answer.json())

    def ask_all(self, prompts: Sequence[str]) -> tuple[list[str], float]:
        """Texts, and the accept length over all of them."""
        answers = [self.ask(prompt) for prompt in prompts]
        tokens = sum(answer["usage"]["completion_tokens"] - 1 for answer in answers)
        rounds = sum(answer["usage"]["livedraft"]["verify_rounds"] for answer in answers)
        return [answer["choices"][0]["text"] for answer in answers], tokens / rounds

    def run(self, *command: str) -> str:
        """What a ``livedraft`` command prints."""
        finished = subprocess.run(
            [python(), "-m", "livedraft.cli.main", *command, "--config", str(self.config)],
            env=_environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def decisions(self) -> list[dict[str, Any]]:
        """The registry's, oldest first."""
        return list(json.loads(self.run("drafts", "decisions", "--json")))

    def _spawn(self, name: str, command: Sequence[str], **environment: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [python(), *command],
                env=_environment() | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )


def python() -> str:
    """The interpreter of the project's own environment."""
    if not (found := os.environ.get("LIVEDRAFT_PYTHON")):
        raise RuntimeError("LIVEDRAFT_PYTHON names no interpreter; `make test-sglang` sets it")
    return found


@contextlib.contextmanager
def looping(folder: Path, drafter: Path) -> Iterator[Loop]:
    """Everything, until the block ends; all begin with ``drafter``, and it ends in good order."""
    relay = f"tcp://127.0.0.1:{free_port()}"
    with engine(folder, Speculation(drafter), LIVEDRAFT_TRACES__URL=f"relay+{relay}") as one:
        loop = Loop(folder, _settings(folder, drafter, one.url, relay), one)
        write_settings(loop.settings, loop.config)
        try:
            one.started(_START_S)
            loop.start_registry()
            loop.start("relay", "gateway", "trainer", "controller")
            loop.eventually(lambda: _answers(f"{loop.url}/readyz"), _START_S)
            # From now on the first drafter has a version.
            loop.eventually(lambda: loop.drafter == "1", _START_S)
            yield loop
            ended = {name: loop.stop(name) for name in PROCESSES}
            assert ended == dict.fromkeys(PROCESSES, 0), {n: loop.log(n) for n, code in ended.items() if code}
        finally:
            for name in [*loop.processes]:
                loop.kill(name)


def _settings(folder: Path, drafter: Path, url: str, relay: str) -> Settings:
    return Settings(
        engine=EngineSettings(url=url, drafter=str(drafter), draft_intermediate=256),
        gateway=Gateway(port=free_port(), health_s=0.3),
        traces=Traces(url=f"spool://{folder}/traces", held_out=0.25),
        relay=Relay(listen=relay),
        trainer=Trainer(folder=str(folder / "trainer"), unroll=3, publish_every_s=10, checkpoint_every_s=5),
        swap=Swap(folder=str(folder / "swap"), watch_rounds=60, watch_requests=4, watch_timeout_s=15, poll_s=0.5),
        registry=Registry(url=f"http://127.0.0.1:{free_port()}", folder=str(folder / "mlflow"), start=False),
    )


def _environment() -> dict[str, str]:
    """Ours, without the shim, which is SGLang's."""
    shim = os.path.join("tests", "sglang", "shim")
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and not p.endswith(shim)]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
