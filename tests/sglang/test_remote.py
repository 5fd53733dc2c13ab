"""SGLang without the plugin, swapped over its own routes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.settings import Settings
from livedraft.serving.sglang.remote import SglangAdmin
from safetensors.numpy import load_file, save_file

from .server import Server, Speculation, serving
from .test_swap import asked_for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, fresh_drafter: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("remote"), Speculation(fresh_drafter)) as one:
        yield one


@pytest.fixture
def admin(server: Server) -> SglangAdmin:
    return SglangAdmin(server.url, Settings())


def test_a_swap_in_the_middle_of_an_answer(
    server: Server, admin: SglangAdmin, fresh_drafter: Path, trained_drafter: Path, prompts: list[str]
) -> None:
    status = admin.status()
    assert (status.drafter, status.drafter_checksum) == ("fresh", asked_for(fresh_drafter).checksum)
    assert status.target == "livedraft-tiny"
    assert not status.capture
    undisturbed = server.generate(prompts[0], max_new_tokens=200)["output_ids"]
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(server.generate(prompts[0], max_new_tokens=200)))
    asking.start()
    receipt = admin.swap(asked_for(trained_drafter))
    asking.join()
    assert (receipt.version, receipt.previous) == ("trained", "fresh")
    assert answers[0]["output_ids"] == undisturbed
    assert admin.status().drafter == "trained"
    assert SglangAdmin(server.url, Settings()).status().drafter_checksum == receipt.checksum, "a new controller sees it"
    assert server.generate(prompts[0])["meta_info"]["spec_accept_length"] > 1.2
    assert admin.swap(asked_for(fresh_drafter)).previous == "trained"
    assert admin.swap(asked_for(trained_drafter)).previous == "fresh"


def test_what_would_end_sglang_is_never_sent(
    server: Server, admin: SglangAdmin, fresh_drafter: Path, tmp_path: Path
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
    assert len(server.generate("def compress(data")["output_ids"]) == 48


def checkpoint_request(folder: Path, checksum: str) -> Any:
    from msgspec.structs import replace

    assert checkpoint.verify(folder)
    return replace(asked_for(folder), checksum=checksum)
