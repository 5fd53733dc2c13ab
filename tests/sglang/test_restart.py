"""A real SGLang that is restarted begins with its first drafter: it is given the live one, and answers name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from livedraft.contracts import checkpoint
from livedraft.contracts.engines import parse
from livedraft.contracts.messages import DrafterVersion
from livedraft.contracts.settings import Gateway
from livedraft.serving.gateway.proxy import Proxy, create_proxy
from livedraft.serving.gateway.server import running
from livedraft.swap import by_hand
from livedraft.swap.engine_admin import HttpEngineAdmin
from livedraft.swap.engine_fleet import EngineFleet
from livedraft.swap.intended import Intended
from livedraft.swap.journal import Journal
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.swap.swapper import Swapper

from .plugged import Engine, engine
from .server import Speculation
from .test_gateway import UPON, eventually


@contextmanager
def restarted(folder: Path, drafter: Path, admin: HttpEngineAdmin) -> Iterator[Engine]:
    """SGLang with the plugin, which ``admin`` reaches from now on."""
    with engine(folder, Speculation(drafter)) as one:
        assert one.started().drafter_checksum
        admin.base = one.base
        yield one


def said_of(one: Engine, prompt: str) -> dict[str, object]:
    """``usage.livedraft`` of an answer through the gateway."""
    settings = Gateway(port=0, health_s=0.1)
    app = create_proxy(settings, parse(one.url), environ={})
    with running(app, settings) as listening, httpx.Client(base_url=listening.url, timeout=120) as http:
        proxy: Proxy = app.state.endpoint
        eventually(lambda: bool(proxy.replicas.ready()) and proxy.replicas.all[0].drafting is not None)
        answer = http.post("/v1/completions", json=UPON | {"prompt": prompt, "max_tokens": 40, "ignore_eos": True})
        extension: dict[str, object] = answer.json()["usage"]["livedraft"]
        return extension


def test_a_restarted_server_is_given_the_live_drafter(
    tmp_path: Path, fresh_drafter: Path, trained_drafter: Path, prompts: list[str]
) -> None:
    registry = MemoryRegistry(tmp_path / "registry")
    for folder in (fresh_drafter, trained_drafter):
        registry.publish(folder, checkpoint.verify(folder)[1], {})
    registry.point("live", "1")
    admin = HttpEngineAdmin("http://127.0.0.1:1")
    state = tmp_path / "swap"
    fleet = EngineFleet([admin], lambda version: state / "versions" / version, Intended(registry, Journal(state)))
    swapper = Swapper(registry, fleet, state)

    def turn() -> DrafterVersion | None:
        with swapper.journal.alone():
            return swapper.inform(swapper.settle())

    with restarted(tmp_path, fresh_drafter, admin) as one:
        assert (live := turn()) is not None
        assert live.version == "1"
        assert admin.status().drafter == "1"  # SGLang had named it after its folder
        by_hand.promote(swapper, "2")
        said = said_of(one, prompts[0])
        assert said["drafter_version"] == "2"
        assert isinstance(said["accept_length"], float)
        assert said["accept_length"] > 1.3
    with restarted(tmp_path, fresh_drafter, admin) as one:
        assert admin.status().drafter_checksum == registry.get("1").checksum
        assert (live := turn()) is not None
        assert live.version == "2"
        assert admin.status().drafter_checksum == registry.get("2").checksum
        found = registry.resolve("live")
        assert found is not None
        assert found.version == "2"
        assert said_of(one, prompts[0])["drafter_version"] == "2"
