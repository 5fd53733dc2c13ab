"""The command line in-process, its settings pointing at a folder of the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import typer
from livedraft.cli import drafts, status, traces
from livedraft.cli.console import LivedraftGroup, settings_from
from livedraft.cli.wiring_registry import open_registry
from livedraft.contracts.messages import DrafterVersion, Manifest
from livedraft.contracts.ports import Engine, Registry
from livedraft.contracts.settings import Gateway, Settings
from livedraft.serving.gateway.app import create_app
from livedraft.serving.gateway.server import running
from typer.testing import CliRunner, Result

from ..swap import drafts as checkpoints
from ..swap.fakes import FakeEngine

app = typer.Typer(cls=LivedraftGroup, pretty_exceptions_enable=False)
app.add_typer(traces.app, name="traces")
app.add_typer(drafts.app, name="drafts")
app.command()(status.status)


class ServedEngine(FakeEngine):
    """An engine that a gateway can drain."""

    def close(self, timeout: float = 10.0) -> None:
        pass


@dataclass
class Site:
    """A place where livedraft is set up: its settings file, and what is behind it."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "livedraft.toml"

    @property
    def settings(self) -> Settings:
        return settings_from(self.config)

    @property
    def spool(self) -> Path:
        return self.folder / "spool"

    @property
    def registry(self) -> Registry:
        return open_registry(self.settings.registry)

    def configure(self, port: int = 1) -> None:
        """Port 1 is where nobody listens."""
        self.config.write_text(
            f"""
            [gateway]
            port = {port}
            [traces]
            url = "spool://{self.spool}"
            [trainer]
            folder = "{self.folder}/trainer"
            [swap]
            folder = "{self.folder}/swap"
            [registry]
            url = "memory:"
            folder = "{self.folder}"  # tells this registry from those of other tests
            """
        )

    def run(self, *arguments: str, says: str | None = None) -> Result:
        """Run a command; what is raised and not expected fails the test."""
        return CliRunner().invoke(
            app, [*arguments, "--config", str(self.config)], input=says, catch_exceptions=False, env={"COLUMNS": "200"}
        )

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Run a command in a process of its own, its standard output and error piped."""
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                # A runner in the background may have started us deaf to interrupts.
                "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
                "from tests.cli.conftest import app; app()",
                *arguments,
                "--config",
                str(self.config),
            ],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def json(self, *arguments: str) -> Any:
        """The JSON that a command prints."""
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def publish(self, seed: int, parent: str | None = None, **metrics: float) -> DrafterVersion:
        """Register a drafter of random weights; its folder is ``drafter-SEED``."""
        folder = self.folder / f"drafter-{seed}"
        manifest = checkpoints.write(folder, seed, _with_parent(parent))
        return self.registry.publish(folder, manifest, metrics)

    @contextmanager
    def serving(self, seed: int, version: str) -> Iterator[FakeEngine]:
        """A real gateway in front of an engine that drafts with ``drafter-SEED``."""
        engine = ServedEngine(self.folder / f"drafter-{seed}", version)
        gateway = Gateway(port=0)
        with running(create_app(cast(Engine, engine), gateway, "tiny", environ={}), gateway) as server:
            self.configure(port=int(server.url.rpartition(":")[2]))
            yield engine


def _with_parent(parent: str | None) -> Manifest:
    return msgspec.structs.replace(checkpoints.MANIFEST, parent=parent, tokens_trained=1234)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.configure()
    return site
