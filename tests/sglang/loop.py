"""The whole loop around real SGLang servers: gateway, relay, trainer, controller and registry.

They are processes of the project's own environment, named by LIVEDRAFT_PYTHON, as they would be in production: SGLang's
environment has the plugin and little else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livedraft.cli.settings_file import write_settings
from livedraft.contracts.errors import SwapFailed
from livedraft.contracts.messages import EngineStatus
from livedraft.contracts.settings import Engine, Gateway, Registry, Relay, Settings, Swap, Traces, Trainer
from livedraft.swap.engine_admin import HttpEngineAdmin
from livedraft.swap.mlflow_server import MlflowServer

from .server import Server, Speculation, free_port, serving

#: In the order in which they end.
PROCESSES = ("controller", "trainer", "gateway", "relay")
_START_S = 180.0
_STOP_S = 60.0


@dataclass
class Loop:
    """A running loop; ``servers`` and ``admins`` belong together."""

    folder: Path
    settings: Settings
    servers: Sequence[Server]
    admins: Sequence[HttpEngineAdmin]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

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
        """Version that the first server drafts with."""
        return self.admins[0].status().drafter

    def start(self, *names: str) -> None:
        """Start processes, again where they were killed."""
        for name in names:
            self._spawn(name, ["-m", "livedraft.cli.main", name, "--config", str(self.config)])

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

    def ask(self, prompt: str, *, max_tokens: int = 48) -> dict[str, Any]:
        """The answer to a greedy completion.  Raises OSError."""
        body = {"prompt": prompt, "model": "tiny", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer))

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

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [python(), *command],
                env=_environment(),
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
def looping(folder: Path, drafter: Path, *, replicas: int = 1) -> Iterator[Loop]:
    """Everything, until the block ends; all begin with ``drafter``, and it ends in good order."""
    relay = f"tcp://127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as held:
        servers, admins = [], []
        for _ in range(replicas):
            port = free_port()
            environment = {
                "LIVEDRAFT_SGLANG__ADMIN_PORT": str(port),
                "LIVEDRAFT_TRACES__URL": f"relay+{relay}",
                "LIVEDRAFT_TRACES__SAMPLE_RATE": "1",
            }
            servers.append(
                held.enter_context(
                    serving(folder, Speculation(drafter), environment=environment, plugins=["livedraft"])
                )
            )
            admins.append(HttpEngineAdmin(f"http://127.0.0.1:{port}"))
        named = [
            f"sglang+{server.url}?admin={admin.base.rpartition(':')[2]}"
            for server, admin in zip(servers, admins, strict=True)
        ]
        loop = Loop(folder, _settings(folder, drafter, ",".join(named), relay), servers, admins)
        write_settings(loop.settings, loop.config)
        try:
            for admin in admins:
                loop.eventually(lambda admin=admin: started(admin) is not None, _START_S)  # type: ignore[misc]
            loop.start_registry()
            # Traces say which process is theirs: those that begin before the relay listens would wait for it.
            loop.start("relay", "gateway", "trainer", "controller")
            loop.eventually(lambda: _ready(loop.url), _START_S)
            # From now on the first drafter has a version.
            loop.eventually(lambda: all(admin.status().drafter == "1" for admin in admins), _START_S)
            yield loop
            ended = {name: loop.stop(name) for name in PROCESSES}
            assert ended == dict.fromkeys(PROCESSES, 0), {n: loop.log(n) for n, code in ended.items() if code}
        finally:
            for name in [*loop.processes]:
                loop.kill(name)


def started(admin: HttpEngineAdmin) -> EngineStatus | None:
    """A server's status, once it has read the target's files."""
    try:
        return admin.status()
    except SwapFailed:
        return None


@contextlib.contextmanager
def traffic(loop: Loop, prompts: Sequence[str], clients: int = 4) -> Iterator[list[dict[str, Any]]]:
    """Requests in turn by some clients until the block ends; their answers, none of which may fail."""
    answers, failures = list[dict[str, Any]](), list[Exception]()
    stop = threading.Event()

    def run(number: int) -> None:
        while not stop.is_set():
            try:
                prompt = prompts[number % len(prompts)]
                answers.append(loop.ask(prompt) | {"prompt": prompt})
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures.append(error)
                return
            number += clients

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


def _settings(folder: Path, drafter: Path, engines: str, relay: str) -> Settings:
    return Settings(
        engine=Engine(url=engines, drafter=str(drafter), draft_intermediate=256),
        gateway=Gateway(port=free_port(), health_s=0.3),
        traces=Traces(url=f"spool://{folder}/traces"),
        relay=Relay(listen=relay),
        trainer=Trainer(folder=str(folder / "trainer"), unroll=3, publish_every_s=15, checkpoint_every_s=5),
        swap=Swap(folder=str(folder / "swap"), watch_rounds=60, watch_requests=4, watch_timeout_s=15, poll_s=0.5),
        registry=Registry(url=f"http://127.0.0.1:{free_port()}", folder=str(folder / "mlflow"), start=False),
    )


def _environment() -> dict[str, str]:
    """Ours, without the shim, which is SGLang's."""
    shim = os.path.join("tests", "sglang", "shim")
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and not p.endswith(shim)]
    mlflow = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**os.environ, **mlflow, "PYTHONPATH": os.pathsep.join(paths)}


def _ready(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
    except OSError:
        return False
    return True
