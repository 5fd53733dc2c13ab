"""compose.yaml and Dockerfile, read, and run as processes of this machine.

Every command line, environment, healthcheck and order of starting is the file's own.  Rewritten are the names of
services and their ports (to free ones here), and the folders that volumes are mounted at.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from livedraft.cli.ports import free_port
from livedraft.cli.wiring import leave_with_parent

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Image:
    """What a target of the Dockerfile says of the process in it."""

    entrypoint: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    run: str = ""


def read_images(text: str) -> dict[str, Image]:
    """Target -> image, each with what it inherits."""
    images: dict[str, Image] = {}
    name, image = "", Image()
    for line in re.sub(r"\\\n", " ", text).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            image = images.get(base, Image())
        elif instruction == "ENV":
            pairs = dict(word.split("=", 1) for word in shlex.split(rest))
            image = Image(image.entrypoint, {**image.environment, **pairs}, image.user, image.run)
        elif instruction == "ENTRYPOINT":
            image = Image(tuple(json.loads(rest)), image.environment, image.user, image.run)
        elif instruction == "USER":
            image = Image(image.entrypoint, image.environment, rest, image.run)
        elif instruction == "RUN":
            image = Image(image.entrypoint, image.environment, image.user, image.run + rest + "\n")
        if name:
            images[name] = image
    return images


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Compose's ``${NAME:-default}`` and ``${NAME:?message}``; ``$$`` is a dollar sign."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        found = environ.get(match[1], "")
        if match[2] == ":?" and not found:
            raise KeyError(f"{match[1]}: {match[3]}")
        return found or (match[3] if match[2] == ":-" else "")

    return re.sub(r"\$\$|\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


def read_compose(environ: Mapping[str, str]) -> dict[str, Any]:
    """The file as Compose reads it."""
    composed: dict[str, Any] = yaml.safe_load(interpolate((ROOT / "compose.yaml").read_text(), environ))
    return composed


def read_env(path: Path) -> dict[str, str]:
    """A .env file."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def seconds(duration: str) -> float:
    """``90s``."""
    return float(duration.removesuffix("s"))


def container_ports(service: Mapping[str, Any]) -> set[int]:
    """Ports that a service listens on."""
    published = {int(str(port).rsplit(":", 1)[1]) for port in service.get("ports", ())}
    return published | {int(port) for port in service.get("expose", ())}


class LocalStack:
    """Services of a compose file as processes.

    ``settings`` rewrites the settings file of a service after names and ports have been rewritten; ``instead`` gives
    the command line of services that cannot run here (an image of somebody else's).
    """

    def __init__(
        self,
        composed: Mapping[str, Any],
        images: Mapping[str, Image],
        folder: Path,
        *,
        settings: Callable[[str, Path], None] = lambda name, path: None,
        instead: Mapping[str, Callable[[LocalStack], list[str]]] | None = None,
    ) -> None:
        self.services: dict[str, dict[str, Any]] = composed["services"]
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._images = images
        self._settings = settings
        self._instead = instead or {}
        self._ports: dict[tuple[str, int], int] = {}

    def port(self, service: str, inside: int) -> int:
        """Where a service's port is here."""
        return self._ports.setdefault((service, inside), free_port())

    def local(self, service: str, text: str) -> str:
        """``text`` of a service's definition or settings, meant for this machine."""
        own = container_ports(self.services[service])

        def ours(match: re.Match[str]) -> str:
            inside = int(match[1])
            return f"127.0.0.1:{self.port(service, inside)}" if inside in own else match[0]

        text = re.sub(r"(?:127\.0\.0\.1|0\.0\.0\.0|localhost):(\d+)", ours, text)
        names = "|".join(map(re.escape, self.services))
        text = re.sub(rf"\b({names}):(\d+)\b", lambda m: f"127.0.0.1:{self.port(m[1], int(m[2]))}", text)
        text = re.sub(
            r"^((?:--)?port ?= ?)(\d+)$", lambda m: m[1] + str(self.port(service, int(m[2]))), text, flags=re.M
        )
        text = text.replace("0.0.0.0", "127.0.0.1")
        for volume in self.services[service].get("volumes", ()):
            source, target, *_ = volume.split(":")
            if not source.startswith("."):
                text = text.replace(target, str(self.folder / "volumes" / source))
        return text

    def command(self, name: str) -> list[str]:
        """The command line of a service, its settings file copied and rewritten."""
        if name in self._instead:
            return self._instead[name](self)
        service = self.services[name]
        words = [*self._images[service["build"]["target"]].entrypoint, *service["command"]]
        for volume in service.get("volumes", ()):
            source, target, *_ = volume.split(":")
            if not source.startswith("."):
                (self.folder / "volumes" / source).mkdir(parents=True, exist_ok=True)
                continue
            copy = self.folder / name / Path(target).name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(self.local(name, (ROOT / source).read_text()))
            self._settings(name, copy)
            words = [word.replace(target, str(copy)) for word in words]
        return _with_interpreter([self.local(name, word) for word in words])

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a service, and what a process of this machine needs."""
        service = self.services[name]
        image = self._images[service["build"]["target"]] if "build" in service else Image()
        said = {**image.environment, **service.get("environment", {})}
        inherited = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "PYTHONPATH") if key in os.environ}
        return {
            **inherited,
            # YAML makes nothing of what was interpolated to nothing; to Compose it is an empty string.
            **{key: self.local(name, "" if value is None else str(value)) for key, value in said.items()},
            "HF_HUB_OFFLINE": "1",
        }

    def start(self, name: str) -> None:
        """Start a service; returns at once."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        with (place / "log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name),
                env=self.environment(name),
                cwd=place,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=leave_with_parent,  # a test run that is killed leaves nobody behind
            )

    def log(self, name: str) -> str:
        """What a service has said."""
        return (self.folder / name / "log").read_text()

    def healthy(self, name: str) -> bool:
        """Whether the service's own healthcheck passes; of a substitute, whether it listens where that would look."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        if name in self._instead:
            inside = re.search(r"(?:localhost|127\.0\.0\.1):(\d+)", " ".join(words))
            assert inside
            return _listens(self.port(name, int(inside[1])))
        words = _with_interpreter([self.local(name, word) for word in words])
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def up(self, names: list[str]) -> None:
        """Start ``names`` in the order of their dependencies, and wait until all are healthy."""
        for name in names:
            for other, how in self.services[name].get("depends_on", {}).items():
                if other not in self.processes:
                    assert other not in names, f"{name} is listed before {other}, which it depends on"
                elif how["condition"] == "service_healthy":
                    self.wait_healthy(other)
            self.start(name)
        for name in names:
            self.wait_healthy(name)

    def wait_healthy(self, name: str, timeout: float = 120) -> None:
        """Until the healthcheck passes."""
        deadline = time.monotonic() + timeout
        while not self.healthy(name):
            assert self.processes[name].poll() is None, f"{name} ended: {self.log(name)}"
            assert time.monotonic() < deadline, f"{name} is not healthy: {self.log(name)}"
            time.sleep(0.3)

    def stop(self, name: str) -> tuple[int | None, float]:
        """SIGTERM, then at most the grace period; the exit status (None: it had to be killed) and the seconds taken."""
        process, began = self.processes.pop(name), time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            code: int | None = process.wait(seconds(self.services[name]["stop_grace_period"]))
        except subprocess.TimeoutExpired:
            code = None
        self._kill(process)
        return code, time.monotonic() - began

    def crash(self, name: str) -> None:
        """End a service as a container ends: every process of it, at once."""
        self._kill(self.processes.pop(name))

    def kill(self) -> None:
        """End what is left, by force."""
        for process in self.processes.values():
            self._kill(process)
        self.processes.clear()

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _with_interpreter(words: list[str]) -> list[str]:
    known = {"livedraft": ["-m", "livedraft.cli.main"], "mlflow": ["-m", "mlflow"], "python": []}
    program, *rest = words
    return [sys.executable, *known[program], *rest] if program in known else words
