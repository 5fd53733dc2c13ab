"""SGLang without the plugin, swapped over its own routes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from livedraft.cli import wiring
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.settings import Engine, Settings, Swap
from livedraft.serving.sglang.remote import SglangAdmin
from livedraft.swap import by_hand
from livedraft.swap.memory_registry import MemoryRegistry
from safetensors.numpy import load_file, save_file

from .server import Server
from .test_swap import asked_for


@pytest.fixture
def admin(chain_server: Server, imported_drafter: Path) -> Iterator[SglangAdmin]:
    """The server's own drafter is back in it in the end."""
    yield (one := SglangAdmin(chain_server.url, Settings()))
    one.swap(asked_for(imported_drafter))


def test_a_swap_in_the_middle_of_an_answer(
    chain_server: Server, admin: SglangAdmin, fresh_drafter: Path, imported_drafter: Path, prompts: list[str]
) -> None:
    server = chain_server
    status = admin.status()
    assert (status.drafter, status.drafter_checksum) == ("imported", asked_for(imported_drafter).checksum)
    assert status.target == "livedraft-tiny"
    assert not status.capture
    undisturbed = server.generate(prompts[0], max_new_tokens=200)["output_ids"]
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(server.generate(prompts[0], max_new_tokens=200)))
    asking.start()
    receipt = admin.swap(asked_for(fresh_drafter))
    asking.join()
    assert (receipt.version, receipt.previous) == ("fresh", "imported")
    assert answers[0]["output_ids"] == undisturbed
    assert admin.status().drafter == "fresh"
    assert SglangAdmin(server.url, Settings()).status().drafter_checksum == receipt.checksum, "a new controller sees it"
    slow = server.generate(prompts[0])["meta_info"]["spec_accept_length"]
    assert admin.swap(asked_for(imported_drafter)).previous == "fresh"
    assert server.generate(prompts[0])["meta_info"]["spec_accept_length"] > max(1.2, slow)
    assert admin.swap(asked_for(fresh_drafter)).previous == "imported"


def test_what_would_end_sglang_is_never_sent(
    chain_server: Server, admin: SglangAdmin, fresh_drafter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(fresh_drafter, folder)
    arrays = load_file(folder / "model.safetensors")
    arrays["fc.weight"] = arrays["fc.weight"][:, :-1].copy()
    save_file(arrays, folder / "model.safetensors")
    before = admin.status()
    with pytest.raises(DrafterRejected, match=r"tensor fc\.weight: shape"):
        admin.swap(asked_for(folder))
    with pytest.raises(SwapFailed, match="expected 0123"):
        admin.swap(checkpoint_request(fresh_drafter, "0123"))
    assert admin.status() == before
    assert len(chain_server.generate("def compress(data")["output_ids"]) == 48


def checkpoint_request(folder: Path, checksum: str) -> Any:
    from msgspec.structs import replace

    assert checkpoint.verify(folder)
    return replace(asked_for(folder), checksum=checksum)


def test_a_controller_that_is_told_so_swaps_without_the_plugin(
    chain_server: Server, fresh_drafter: Path, imported_drafter: Path, prompts: list[str], tmp_path: Path
) -> None:
    settings = Settings(
        engine=Engine(url=f"sglang+{chain_server.url}?plugin=no"), swap=Swap(folder=str(tmp_path / "swap"))
    )
    registry = MemoryRegistry(tmp_path / "registry")
    for folder in (imported_drafter, fresh_drafter):
        registry.publish(folder, checkpoint.verify(folder)[1], {})
    registry.point("live", "1")
    expected = chain_server.generate(prompts[0])["output_ids"]
    swapper = wiring.swapper(settings, registry)
    try:
        by_hand.promote(swapper, "2")
        assert wiring.engine_admin(settings).status().drafter == "2"
        assert chain_server.generate(prompts[0])["output_ids"] == expected
        by_hand.rollback(swapper)
        assert (live := registry.resolve("live")) is not None
        assert live.version == wiring.engine_admin(settings).status().drafter == "1"
    finally:
        SglangAdmin(chain_server.url, Settings()).swap(asked_for(imported_drafter))
