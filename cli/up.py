"""``livedraft up``: the processes of one machine, each started again when it dies."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from livedraft.cli import wiring
from livedraft.cli.wiring_registry import open_registry
from livedraft.contracts.errors import LivedraftError, Overloaded, RegistryUnavailable, SettingsError
from livedraft.contracts.settings import Settings
from livedraft.contracts.stopping import stopping
from livedraft.swap.mlflow_server import MlflowServer
from rich.console import Console

#: Seconds a child gets to end by itself: the gateway's drain and the trainer's last checkpoint.
_GRACE_S = 30.0
#: Seconds before a dead child is started again, so that a broken one does not spin.
_RESTART_S = 2.0


class Child:
    """One process of ours: its command, its log, its restarts."""

    def __init__(self, name: str, arguments: Callable[[], list[str]], log: Path) -> None:
        self.name = name
        self.restarts = 0
        self.log = log
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._died_at = 0.0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start it in a process group of its own, so that Ctrl-C reaches it only through us."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "livedraft.cli.main", *self._arguments()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def keep(self, console: Console) -> None:
        """Start it again if it died a while ago."""
        if self.pid is not None:
            return
        if not self._died_at:
            self._died_at = time.monotonic()
            code = self._process.returncode if self._process else None
            console.print(f"[yellow]{self.name} ended with {code}; starting it again (log: {self.log})")
        elif time.monotonic() - self._died_at > _RESTART_S:
            self._died_at = 0.0
            self.restarts += 1
            self.start()

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float) -> None:
        """Until it has ended; by force after ``timeout`` seconds."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Stack:
    """The children and the registry, if we started one."""

    def __init__(self, children: list[Child], server: MlflowServer | None) -> None:
        self.children = children
        self._server = server

    def keep(self, console: Console) -> None:
        """Start again what has died: first whatever serves."""
        for child in self.children:
            child.keep(console)
        if self._server and not self._server.alive:
            console.print(f"[yellow]registry ended; starting it again (log: {self._server.log})")
            try:
                self._server.start()
            except RegistryUnavailable as error:
                console.print(f"[red]{error}")


class _Live:
    """What serving starts with: the live drafter now, or the last one known while the registry is down."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._last: tuple[Path, str] | None = None

    def arguments(self) -> list[str]:
        """Folder and version."""
        try:
            folder, live = wiring.live_drafter(self._settings, open_registry(self._settings.registry))
            self._last = folder, live.version
        except RegistryUnavailable:
            if self._last is None:
                raise
        return [str(part) for part in self._last]


@contextmanager
def stack(
    settings: Settings, config: Path | None, target: str, console: Console, *, environment: dict[str, str] | None = None
) -> Iterator[Stack]:
    """Registry, endpoint, trainer and controller, running and ready; all ended in the right order afterwards."""
    os.environ.update(environment or {})
    logs = Path(settings.trainer.folder).resolve().parent / "logs"
    shared = [*(["--config", str(config)] if config else []), *(["--target", target] if target else [])]
    server = MlflowServer(settings.registry) if settings.registry.start else None
    children: list[Child] = []
    try:
        with console.status("starting the registry (20 s the first time)"):
            if server:
                server.start()
        drafter = _Live(settings)
        serving = Child("serve", lambda: ["serve", *drafter.arguments(), *shared], logs / "serve.log")
        children.append(serving)
        with console.status("fetching the live drafter, or making one that knows nothing; loading the target"):
            serving.start()
            _wait_ready(settings, serving)
        for name in ("train", "control"):
            child = Child(name, functools.partial(lambda name: [name, *shared], name), logs / f"{name}.log")
            children.append(child)
            child.start()
        yield Stack(children, server)
    finally:
        with console.status("stopping: running requests finish, the trainer checkpoints"):
            # The controller first, so that nothing is swapped into an engine that is going.
            for child in reversed(children):
                child.ask_to_stop()
            for child in reversed(children):
                child.wait(_GRACE_S)
            if server:
                server.stop()


def up(settings: Settings, config: Path | None, target: str) -> None:
    """Run until SIGINT or SIGTERM."""
    if settings.engine.remote:
        raise SettingsError(f"engine.url is {settings.engine.url!r}, expected local: for `livedraft up`")
    console = Console()
    with stopping() as stop, stack(settings, config, target, console) as running:
        base = wiring.gateway_url(settings)
        console.print(f"[bold]OpenAI endpoint[/]  {base}/v1")
        console.print(f"[bold]metrics[/]          {base}/metrics")
        console.print(f"[bold]MLflow registry[/]  {settings.registry.url}")
        console.print(
            f"Try: curl {base}/v1/completions -H 'content-type: application/json' "
            '-d \'{"model": "", "prompt": "In the beginning", "max_tokens": 32}\''.replace(
                '"model": ""', f'"model": "{_model(settings)}"'
            )
        )
        console.print("`livedraft status` shows what is going on; Ctrl-C stops everything.")
        while not stop.wait(0.5):
            running.keep(console)


def _model(settings: Settings) -> str:
    from livedraft.serving.local.place import name

    return name(settings.engine.target)


def _wait_ready(settings: Settings, serving: Child, timeout: float = 180.0) -> None:
    deadline = time.monotonic() + timeout
    url = f"{wiring.gateway_url(settings)}/readyz"
    wait = threading.Event()
    while time.monotonic() < deadline:
        if serving.pid is None:
            raise LivedraftError(f"the serving process ended while starting; see {serving.log}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            wait.wait(0.2)
    raise Overloaded(f"the serving process was not ready after {timeout:.0f} s; see {serving.log}")
