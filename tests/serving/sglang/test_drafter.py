"""A checkpoint reaches the parameters whole and proven, or touches nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import SwapRequest
from livedraft.serving.sglang.drafter import ServedDrafter
from livedraft.serving.sglang.identity import Drafting, Identity
from livedraft.serving.sglang.weights import LiveWeights
from msgspec.structs import replace
from torch import Tensor

from ...swap import drafts
from .model import Drafter, target_of

IDENTITY = Identity(
    engine="sglang",
    target="tiny",
    target_revision="r1",
    tokenizer_hash="tok",
    context_length=32,
    leads=True,
)
START = "17"


class Served:
    """A model that was started from a folder, as SGLang does it, and the drafter under test over it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = Drafter(drafts.CONFIG, **options)
        self.model.load_weights([(n, torch.from_numpy(a)) for n, a in checkpoint.load(folder).items()])
        self.drafting = Drafting(START)
        live = LiveWeights(self.model, target_of(self.model))
        self.drafter = ServedDrafter(live, self.model.config, self.model.hot_token_id, self.drafting)
        self.drafter.prove(folder, IDENTITY)

    def swap(self, request: SwapRequest) -> None:
        """As the exchange does it, where nothing fails."""
        self.drafter.apply(self.drafter.stage(request))
        self.drafter.confirm()
        self.drafter.keep()

    @property
    def bytes(self) -> list[bytes]:
        return [p.data.contiguous().view(torch.uint8).numpy().tobytes() for p in self.model.parameters()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    drafts.write(tmp_path / START)
    return tmp_path / START


@pytest.fixture
def served(folder: Path) -> Served:
    return Served(folder)


def written(folder: Path, name: str, seed: int, **about: Any) -> SwapRequest:
    manifest = drafts.write(folder.with_name(name), seed, replace(drafts.MANIFEST, **about))
    return SwapRequest(path=str(folder.with_name(name)), version=name, checksum=checkpoint.checksum(manifest.tensors))


def fused(folder: Path) -> dict[str, np.ndarray]:
    """The parameters a checkpoint should become on one rank, worked out by hand."""
    t = {name.removeprefix("midlayer."): array for name, array in checkpoint.load(folder).items()}
    parts = {
        "model.layers.0.self_attn.qkv_proj.weight": [t[f"self_attn.{n}_proj.weight"] for n in "qkv"],
        "model.layers.0.mlp.gate_up_proj.weight": [t["mlp.gate_proj.weight"], t["mlp.up_proj.weight"]],
        "model.layers.0.self_attn.o_proj.weight": [t["self_attn.o_proj.weight"]],
        "model.layers.0.mlp.down_proj.weight": [t["mlp.down_proj.weight"]],
        "model.fc.weight": [t["fc.weight"]],
        "model.norm.weight": [t["norm.weight"]],
        "lm_head.weight": [t["lm_head.weight"], np.zeros((8, drafts.CONFIG.hidden_size), "<f4")],
    }
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    parts |= {f"model.layers.0.{n}.weight": [t[f"{n}.weight"]] for n in norms}
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def test_what_the_engine_started_with_is_known_by_its_tensors(served: Served, folder: Path) -> None:
    manifest = checkpoint.verify(folder)[1]
    assert served.drafter.checksum == checkpoint.checksum(manifest.tensors)
    assert served.drafter.version == served.drafting.version == START


def test_torchs_own_format_is_read_too(folder: Path) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in checkpoint.load(folder).items()}
    expected = Served(folder).drafter.checksum
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "elsewhere")
    drafter = Served.__new__(Served)
    drafter.model = Drafter(drafts.CONFIG)
    drafter.model.load_weights([*tensors.items()])
    live = LiveWeights(drafter.model, target_of(drafter.model))
    one = ServedDrafter(live, drafter.model.config, drafter.model.hot_token_id, Drafting())
    one.prove(folder, IDENTITY)
    assert one.checksum == expected


def test_a_swap_writes_every_parameter_and_leaves_the_targets(served: Served, folder: Path) -> None:
    embedding = served.model.model.embed_tokens.weight.clone()
    pointers = [p.data_ptr() for p in served.model.parameters()]
    request = written(folder, "18", seed=1)
    served.swap(request)
    parameters = dict(served.model.named_parameters())
    for name, expected in fused(folder.with_name("18")).items():
        assert np.array_equal(parameters[name].numpy(), expected), name
    assert torch.equal(served.model.model.embed_tokens.weight, embedding)
    assert [p.data_ptr() for p in served.model.parameters()] == pointers, "captured graphs read where they always did"
    assert (served.drafter.version, served.drafter.checksum) == ("18", request.checksum)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_shard(folder: Path, rank: int) -> None:
    served = Served(folder, rank=rank, ranks=2)
    served.swap(written(folder, "18", seed=1))
    gate_up = dict(served.model.named_parameters())["model.layers.0.mlp.gate_up_proj.weight"]
    t = checkpoint.load(folder.with_name("18"))
    half = slice(6 * rank, 6 * rank + 6)
    expected = np.concatenate([t[f"midlayer.mlp.{n}_proj.weight"][half] for n in ("gate", "up")])
    assert np.array_equal(gate_up.numpy(), expected)


def test_an_engine_in_bfloat16_holds_the_rounded_checkpoint(folder: Path) -> None:
    served = Served(folder, dtype=torch.bfloat16)
    request = written(folder, "18", seed=1)
    served.swap(request)
    expected = torch.from_numpy(checkpoint.load(folder.with_name("18"))["fc.weight"]).bfloat16()
    assert torch.equal(served.model.model.fc.weight, expected)
    assert served.drafter.checksum == request.checksum


def test_going_back_needs_no_disk(served: Served, folder: Path) -> None:
    before = served.bytes
    back = SwapRequest(path=str(folder), version=START, checksum=served.drafter.checksum)
    served.swap(written(folder, "18", seed=1))
    assert served.bytes != before
    shutil.rmtree(folder)
    served.swap(back)
    assert served.bytes == before
    assert served.drafter.version == START
    with pytest.raises(DrafterRejected, match="No such file"):
        served.drafter.stage(replace(back, checksum="of another one"))


def test_restoring_brings_every_byte_back(served: Served, folder: Path) -> None:
    before = served.bytes
    served.drafter.apply(served.drafter.stage(written(folder, "18", seed=1)))
    served.drafter.restore()
    served.drafter.confirm()
    assert served.bytes == before
    assert served.drafter.version == START


def test_a_write_that_did_not_take_is_found(served: Served, folder: Path) -> None:
    served.drafter.apply(served.drafter.stage(written(folder, "18", seed=1)))
    served.model.model.norm.weight.data[0] += 1
    with pytest.raises(SwapFailed, match=r"model\.norm\.weight does not hold"):
        served.drafter.confirm()


def test_weights_written_by_others_are_nobodys_until_the_next_swap(served: Served, folder: Path) -> None:
    served.drafter.audit()
    assert served.drafter.version == START
    served.model.model.norm.weight.data[0] += 1
    served.drafter.audit()
    assert (served.drafter.version, served.drafter.checksum) == ("", "")
    served.swap(SwapRequest(path=str(folder), version=START, checksum=Served(folder).drafter.checksum))
    served.drafter.audit()
    assert served.drafter.version == START


def test_an_audit_says_nothing_of_a_swap_under_way(served: Served, folder: Path) -> None:
    served.drafter.apply(served.drafter.stage(written(folder, "18", seed=1)))
    served.drafter.audit()
    assert served.drafter.version == START


Tamper = Callable[[Path], None]


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Tamper:
    """A folder in which ``name`` was changed (None: left out), with a manifest to match."""

    def tamper(folder: Path) -> None:
        from safetensors.numpy import save_file

        arrays = dict(checkpoint.load(folder))
        changed = change(arrays[name].copy())
        del arrays[name]
        if changed is not None:
            arrays[name] = np.ascontiguousarray(changed)
        save_file(arrays, folder / "model.safetensors")
        about = json.loads((folder / "manifest.json").read_text())
        about["tensors"] = checkpoint.hash_tensors(arrays)
        (folder / "manifest.json").write_text(json.dumps(about))

    return tamper


def with_nan(array: np.ndarray) -> np.ndarray:
    array.flat[3] = np.nan
    return array


def config(**fields: Any) -> Tamper:
    def tamper(folder: Path) -> None:
        path = folder / "config.json"
        about = json.loads(path.read_text()) | fields
        path.write_text(json.dumps(about))

    return tamper


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (tensor("fc.weight", with_nan), "tensor fc.weight: NaN"),
        (tensor("midlayer.mlp.up_proj.weight", lambda a: a[:-1]), r"tensor midlayer\.mlp\.up_proj\.weight: shape"),
        (tensor("norm.weight", lambda a: None), r"tensor norm\.weight: missing"),
        (tensor("d2t", lambda a: a - a), "tensor t2d: does not mark"),
        (config(rms_norm_eps=1e-5), "config.json: rms_norm_eps is 1e-05, the drafter in service has 1e-06"),
        (config(rope_theta=500000.0), r"config.json: rope_theta is 500000.0, the drafter in service has 10000.0"),
    ],
)
def test_a_bad_candidate_is_refused_by_name_and_nothing_changes(
    served: Served, folder: Path, tamper: Tamper, reason: str
) -> None:
    before = served.bytes
    request = written(folder, "18", seed=1)
    tamper(folder.with_name("18"))
    manifest = json.loads((folder.with_name("18") / "manifest.json").read_text())
    request = replace(request, checksum=checkpoint.checksum(manifest["tensors"]))
    with pytest.raises(DrafterRejected, match=reason):
        served.drafter.stage(request)
    assert served.bytes == before
    assert served.drafter.version == START


@pytest.mark.parametrize(
    ("about", "reason"),
    [({"target_revision": "r2"}, "trained for revision r2"), ({"tokenizer_hash": "x"}, "tokenizer_hash differs")],
)
def test_a_candidate_for_another_target_is_refused(
    served: Served, folder: Path, about: dict[str, str], reason: str
) -> None:
    with pytest.raises(DrafterRejected, match=reason):
        served.drafter.stage(written(folder, "18", seed=1, **about))


def test_another_vocabulary_is_refused(served: Served, folder: Path) -> None:
    arrays = drafts.tensors(1)
    arrays["d2t"][0] -= 2
    arrays["t2d"][4], arrays["t2d"][6] = True, False
    manifest = checkpoint.write(folder.with_name("18"), drafts.CONFIG, arrays, drafts.MANIFEST)
    request = SwapRequest(
        path=str(folder.with_name("18")), version="18", checksum=checkpoint.checksum(manifest.tensors)
    )
    with pytest.raises(DrafterRejected, match="tensor d2t: differs"):
        served.drafter.stage(request)


def test_a_folder_that_is_not_what_was_asked_for_is_a_failed_swap(served: Served, folder: Path) -> None:
    with pytest.raises(SwapFailed, match="expected other"):
        served.drafter.stage(replace(written(folder, "18", seed=1), checksum="other"))


def test_other_shapes_are_refused_before_they_can_be_cut_to_fit(served: Served, folder: Path) -> None:
    wide = replace_config(intermediate_size=16)
    manifest = checkpoint.write(folder.with_name("18"), wide, drafts.tensors(1, wide), drafts.MANIFEST)
    request = SwapRequest(
        path=str(folder.with_name("18")), version="18", checksum=checkpoint.checksum(manifest.tensors)
    )
    with pytest.raises(DrafterRejected, match="intermediate_size is 16, the drafter in service has 12"):
        served.drafter.stage(request)


def replace_config(**fields: Any) -> checkpoint.DrafterConfig:
    return replace(drafts.CONFIG, **fields)


def test_repacked_parameters_are_never_written(folder: Path) -> None:
    with pytest.raises(SwapFailed, match=r"model\.fc\.weight is not what SGLang's loader makes of"):
        Repacked(folder)


class Repacked(Served):
    """SGLang has laid one parameter out anew for its device."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model.model.fc.weight.data.copy_(self.model.model.fc.weight.data.flip(1))
        live = LiveWeights(self.model, target_of(self.model))
        drafter = ServedDrafter(live, self.model.config, self.model.hot_token_id, Drafting())
        try:
            drafter.prove(folder, IDENTITY)
        finally:
            request = SwapRequest(path=str(folder), version="1", checksum="1")
            with pytest.raises(SwapFailed, match="does not swap: parameter"):
                drafter.stage(request)


def test_a_quantised_drafter_is_never_written(folder: Path) -> None:
    model = Drafter(drafts.CONFIG)
    model.model.fc.weight = torch.nn.Parameter(torch.zeros(8, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SwapFailed, match="quantised"):
        LiveWeights(model, target_of(model))


def test_a_head_that_is_the_targets_is_never_written(folder: Path) -> None:
    model = Drafter(drafts.CONFIG, pad=0)
    model.load_weights([(n, torch.from_numpy(a)) for n, a in checkpoint.load(folder).items()])
    target = target_of(model)
    target.lm_head = model.lm_head
    before: Tensor = model.lm_head.weight.clone()
    live = LiveWeights(model, target)
    with pytest.raises(SwapFailed, match="head is the target's"):
        ServedDrafter(live, model.config, model.hot_token_id, Drafting()).prove(folder, IDENTITY)
    assert torch.equal(model.lm_head.weight, before)
