"""Drafters exchanged inside a real SGLang: answers stay what they are, and what is bad never gets in."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import SwapRequest
from livedraft.serving.local import place
from livedraft.serving.local.text import Text
from livedraft.serving.sglang.surface import installed
from livedraft.swap.engine_admin import HttpEngineAdmin
from msgspec.structs import replace

from . import drafters
from .plugged import Engine, engine
from .server import SHIM, TARGET, Server, Speculation

PROMPT = "def compress(data"


@pytest.fixture(autouse=True)
def back_to_the_first(request: pytest.FixtureRequest, fresh_drafter: Path) -> Iterator[None]:
    yield
    if "swapping" in request.fixturenames:
        request.getfixturevalue("swapping").admin.swap(asked_for(fresh_drafter))


def asked_for(folder: Path, version: str = "") -> SwapRequest:
    manifest = json.loads((folder / "manifest.json").read_text())
    return SwapRequest(
        path=str(folder), version=version or folder.name, checksum=checkpoint.checksum(manifest["tensors"])
    )


def test_the_engine_knows_itself_as_the_embedded_one_would(swapping: Engine, fresh_drafter: Path) -> None:
    status = swapping.admin.status()
    assert status.engine == "sglang"
    assert status.target == place.name("bundled")
    assert status.target_revision == place.revision(TARGET)
    assert status.tokenizer_hash == Text(TARGET).hash
    assert (status.drafter, status.drafter_checksum) == ("fresh", asked_for(fresh_drafter).checksum)
    assert status.running == status.waiting == 0
    assert "swap" not in status.disabled


def test_a_swap_in_the_middle_of_an_answer_changes_its_speed_and_nothing_else(
    swapping: Engine, trained_drafter: Path, prompts: list[str]
) -> None:
    server = swapping.server
    undisturbed = [server.generate(prompt, max_new_tokens=200) for prompt in prompts[:4]]
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.extend(server.generate_together(prompts[:4], max_new_tokens=200)))
    asking.start()
    while swapping.admin.status().running < 4:
        time.sleep(0.005)
    receipt = swapping.admin.swap(asked_for(trained_drafter))
    assert swapping.admin.status().running, "the answers were still under way"
    asking.join()
    assert (receipt.version, receipt.previous) == ("trained", "fresh")
    assert receipt.checksum == asked_for(trained_drafter).checksum
    assert [a["output_ids"] for a in answers] == [u["output_ids"] for u in undisturbed]
    status = swapping.admin.status()
    assert (status.drafter, status.drafter_checksum) == ("trained", receipt.checksum)
    assert set(status.by_drafter) >= {"fresh", "trained"}
    after = [server.generate(prompt, max_new_tokens=48) for prompt in prompts[:4]]
    assert [a["output_ids"] for a in after] == [u["output_ids"][:48] for u in undisturbed]
    rounds = [sum(answer["meta_info"]["spec_verify_ct"] for answer in batch) for batch in (after, undisturbed)]
    assert rounds[0] < rounds[1] * 48 / 200 * 0.8, "the trained drafter is the one that drafts now"
    print(f"\nstall {receipt.stall_s * 1000:.2f} ms")  # noqa: T201


def test_going_back_needs_no_folder(swapping: Engine, trained_drafter: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_drafter, tmp_path / "17")
    first = asked_for(tmp_path / "17")
    swapping.admin.swap(first)
    drafters.write_fresh(tmp_path / "18", seed=3)
    swapping.admin.swap(asked_for(tmp_path / "18"))
    shutil.rmtree(tmp_path / "17")
    assert swapping.admin.swap(first).checksum == first.checksum
    assert swapping.admin.status().drafter == "17"


Tamper = Callable[[dict[str, np.ndarray], dict[str, Any], dict[str, Any]], object]


def _nan(arrays: dict[str, np.ndarray], manifest: dict[str, Any], config: dict[str, Any]) -> None:
    arrays["fc.weight"][0, 0] = np.nan


def _vocabulary(arrays: dict[str, np.ndarray], manifest: dict[str, Any], config: dict[str, Any]) -> None:
    """Two draft rows change places, so that the folder is sound in itself."""
    ids = arrays["d2t"] + np.arange(len(arrays["d2t"]))
    ids[[0, 1]] = ids[[1, 0]]
    arrays["d2t"] = ids - np.arange(len(ids))


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (_nan, r"tensor fc\.weight: NaN"),
        (lambda a, m, c: a.update({"norm.weight": a["norm.weight"][1:]}), r"tensor norm\.weight: shape"),
        (lambda a, m, c: a.pop("midlayer.mlp.up_proj.weight"), r"tensor midlayer\.mlp\.up_proj\.weight: missing"),
        (lambda a, m, c: m.update(target_revision="elsewhere"), "trained for revision elsewhere"),
        (lambda a, m, c: m.update(tokenizer_hash="elsewhere"), "tokenizer_hash differs"),
        (lambda a, m, c: c.update(rope_theta=5e5, rope_parameters=None), "rope_theta is 500000"),
        (_vocabulary, "tensor d2t: differs"),
    ],
    ids=["nan", "shape", "missing", "target", "tokenizer", "config", "vocabulary"],
)
def test_a_bad_drafter_is_refused_by_name_and_harms_nothing(
    swapping: Engine, fresh_drafter: Path, tmp_path: Path, tamper: Tamper, reason: str
) -> None:
    from safetensors.numpy import save_file

    folder = tmp_path / "bad"
    shutil.copytree(fresh_drafter, folder)
    arrays = checkpoint.load(folder)
    arrays["norm.weight"] *= np.float32(1.01)  # other weights than the engine holds, which it would not read again
    manifest = json.loads((folder / "manifest.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    tamper(arrays, manifest, config)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    manifest["tensors"] = checkpoint.hash_tensors(arrays)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps(config))
    before = swapping.server.generate(PROMPT)["output_ids"]
    with pytest.raises(DrafterRejected, match=reason):
        swapping.admin.swap(asked_for(folder))
    assert swapping.admin.status().drafter_checksum == asked_for(fresh_drafter).checksum
    assert swapping.server.generate(PROMPT)["output_ids"] == before


def test_a_folder_of_other_tensors_than_named_is_a_failed_swap(swapping: Engine, trained_drafter: Path) -> None:
    with pytest.raises(SwapFailed, match="expected 0123"):
        swapping.admin.swap(replace(asked_for(trained_drafter), checksum="0123"))
    with pytest.raises(DrafterRejected, match="No such file"):
        swapping.admin.swap(SwapRequest(path="/nowhere", version="1", checksum="0123"))


@pytest.mark.skipif(
    not torch.cuda.is_available() and installed() in ("0.5.21", "0.5.22"), reason="its checksums need CUDA"
)
def test_sglang_sees_the_weights_change_and_come_back(
    swapping: Engine, trained_drafter: Path, fresh_drafter: Path
) -> None:
    def of_drafter() -> Any:
        return swapping.server.post("/weights_checker", {"action": "checksum", "selector": "draft"})

    def of_target() -> Any:
        return swapping.server.post("/weights_checker", {"action": "checksum", "selector": "target"})

    first, target = of_drafter(), of_target()
    swapping.admin.swap(asked_for(trained_drafter))
    assert of_drafter() != first
    swapping.admin.swap(asked_for(fresh_drafter))
    assert of_drafter() == first
    assert of_target() == target


def test_swaps_under_load_fail_no_request(
    swapping: Engine, trained_drafter: Path, fresh_drafter: Path, prompts: list[str]
) -> None:
    swaps, clients, apart_s = 24, 4, 0.15
    expected = {prompt: swapping.server.generate(prompt, max_new_tokens=64)["output_ids"] for prompt in prompts}
    ended, failures, waits = threading.Event(), list[str](), list[tuple[float, float]]()

    def ask(offset: int) -> None:
        for prompt in itertools.islice(itertools.cycle(prompts), offset, None):
            if ended.is_set():
                return
            try:
                tokens, between = gaps(swapping.server, prompt, 64)
            except Exception as error:
                failures.append(repr(error))
                return
            waits.extend(between)
            if tokens != expected[prompt]:
                failures.append(f"another answer to {prompt!r}")

    askers = [threading.Thread(target=ask, args=(offset,)) for offset in range(clients)]
    for asker in askers:
        asker.start()
    receipts = []
    try:
        time.sleep(swaps * apart_s)
        began = time.perf_counter()
        for folder in itertools.islice(itertools.cycle([trained_drafter, fresh_drafter]), swaps):
            receipts.append(swapping.admin.swap(asked_for(folder)))
            time.sleep(apart_s)
    finally:
        ended.set()
        for asker in askers:
            asker.join()
    assert not failures
    assert len(receipts) == swaps
    before, during = ([1000 * wait for at, wait in waits if (at >= began) == after] for after in (False, True))
    assert during
    stalls = sorted(receipt.stall_s * 1000 for receipt in receipts)
    print(  # noqa: T201
        f"\n{swaps} swaps: stall median {stalls[swaps // 2]:.2f} ms, longest {stalls[-1]:.2f} ms; wait for a token:"
        f" without swaps {told(before)}, with them {told(during)}"
    )


def told(waits: list[float]) -> str:
    middle, most = np.percentile(waits, [50, 99])
    return f"median {middle:.1f}, 99 % {most:.1f}, longest {max(waits):.1f} ms ({len(waits)})"


def gaps(server: Server, prompt: str, tokens: int) -> tuple[list[int], list[tuple[float, float]]]:
    """A streamed answer, and when each of its pieces came with the seconds since the one before."""
    output, times = server.stream(prompt, max_new_tokens=tokens)
    return output, [(later, later - earlier) for earlier, later in itertools.pairwise(times)]


def test_without_a_drafter_it_administers_itself_and_says_why_it_does_nothing(plain: Engine) -> None:
    status = plain.started()
    assert (status.drafter, status.drafter_checksum, status.capture) == ("", "", False)
    assert "EAGLE3" in status.disabled["swap"]
    with pytest.raises(SwapFailed, match="EAGLE3"):
        plain.admin.swap(SwapRequest(path="/x", version="1", checksum="1"))
    for key in (None, "wrong"):
        with pytest.raises(SwapFailed, match="401 missing or wrong admin key"):
            HttpEngineAdmin(plain.base, key).status()
    assert plain.server.generate(PROMPT, max_new_tokens=4)["output_ids"]


def test_a_changed_sglang_is_served_with_the_plugin_off_and_says_why(tmp_path: Path, fresh_drafter: Path) -> None:
    """Another plugin stands for a release in which what the swap hooks has other parameters.

    SGLang imports the modules of all plugins before it calls the first of them.
    """
    write_plugin(
        tmp_path / "release",
        "release",
        """
        from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver as Receiver

        original = Receiver._broadcast_reqs_across_ranks
        Receiver._broadcast_reqs_across_ranks = lambda self, incoming, local=None: original(self, incoming, local)

        def register():
            pass
        """,
    )
    path = os.pathsep.join([str(tmp_path / "release"), str(SHIM), os.environ.get("PYTHONPATH", "")])
    with engine(tmp_path, Speculation(fresh_drafter), plugins="release,livedraft", PYTHONPATH=path) as one:
        status = one.started()
        reason = "takes (incoming, local); the hook needs (recv_reqs, ...)"
        assert any(reason in why for why in status.disabled.values())
        with pytest.raises(SwapFailed, match=r"the hook needs \(recv_reqs"):
            one.admin.swap(asked_for(fresh_drafter))
        assert len(one.server.generate(PROMPT)["output_ids"]) == 48
        assert "the hook needs (recv_reqs, ...)" in one.server.log.read_text()


def test_settings_that_cannot_be_read_leave_sglang_alone(tmp_path: Path, fresh_drafter: Path) -> None:
    settings = tmp_path / "livedraft.toml"
    settings.write_text("[sglang]\nadmin_prot = 1\n")
    with engine(tmp_path, Speculation(fresh_drafter), LIVEDRAFT_CONFIG=str(settings)) as one:
        assert len(one.server.generate(PROMPT)["output_ids"]) == 48
        with pytest.raises(SwapFailed, match="refused"):
            one.admin.status()
        assert "livedraft stays off" in one.server.log.read_text()
        assert "admin_prot" in one.server.log.read_text()


def write_plugin(folder: Path, name: str, code: str) -> None:
    """A plugin of SGLang that needs no installing: a module and the metadata of its entry point."""
    about = folder / f"{name}-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}_plugin:register\n")
    (folder / f"{name}_plugin.py").write_text(textwrap.dedent(code))
