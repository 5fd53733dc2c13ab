"""A real SGLang with the plugin in it, and its administration."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from livedraft.cli.ports import free_port
from livedraft.contracts.errors import SwapFailed
from livedraft.contracts.messages import EngineStatus
from livedraft.swap.engine_admin import HttpEngineAdmin

from .relay import Relay
from .server import TARGET, Device, Server, Speculation, serving


class Engine:
    """A server with the plugin in it, and its administration."""

    def __init__(self, server: Server, port: int, key: str | None = None) -> None:
        self.server = server
        self.base = f"http://127.0.0.1:{port}"
        self.admin = HttpEngineAdmin(self.base, key)

    @property
    def url(self) -> str:
        """As the setting ``engine.url`` names it."""
        return f"sglang+{self.server.url}?admin={self.base.rpartition(':')[2]}"

    def started(self, within_s: float = 60.0) -> EngineStatus:
        """Its status, as soon as it has read the target's files."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                return self.admin.status()
            except SwapFailed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


@contextlib.contextmanager
def engine(
    folder: Path,
    speculation: Speculation | None,
    *,
    key: str | None = None,
    target: Path = TARGET,
    device: Device = "cpu",
    arguments: Sequence[str] = (),
    **environment: str,
) -> Iterator[Engine]:
    """One that ``serving`` starts; ``environment`` is the plugin's, its entry ``plugins`` those that SGLang loads."""
    port = free_port()
    environment["LIVEDRAFT_SGLANG__ADMIN_PORT"] = str(port)
    if key is not None:
        environment["LIVEDRAFT_GATEWAY__ADMIN_KEY"] = key
    plugins = environment.pop("plugins", "livedraft").split(",")
    with serving(
        folder,
        speculation,
        target=target,
        device=device,
        arguments=arguments,
        environment=environment,
        plugins=plugins,
    ) as server:
        yield Engine(server, port, key)


@contextlib.contextmanager
def capturing(
    folder: Path, speculation: Speculation, arguments: Sequence[str] = (), **environment: str
) -> Iterator[tuple[Server, Relay]]:
    """A server with the plugin, whose traces arrive at the relay."""
    with contextlib.closing(Relay()) as relay:
        ours: dict[str, Any] = {"LIVEDRAFT_TRACES__URL": relay.url, **environment}
        with engine(folder, speculation, arguments=arguments, **ours) as one:
            yield one.server, relay
