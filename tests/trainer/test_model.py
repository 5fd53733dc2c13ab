"""Reading targets, writing and reading drafters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SettingsError
from livedraft.contracts.messages import Manifest
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import Target, feature_layers, fresh_config, read_target
from safetensors.torch import save_file

MANIFEST = Manifest(tensors={}, target="tiny", target_revision="r", tokenizer_hash="h")


def write(drafter: Drafter, folder: Path) -> None:
    checkpoint.write(folder, drafter.config, drafter.to_arrays(), MANIFEST)


def test_a_fresh_drafter_makes_a_checkpoint_that_comes_back(target: Target, tmp_path: Path) -> None:
    drafter = Drafter.fresh(target, fresh_config(target), seed=5)
    write(drafter, tmp_path / "d")
    checkpoint.verify(tmp_path / "d")
    back = Drafter.from_checkpoint(tmp_path / "d", target.embedding)
    for (name, a), b in zip(drafter.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    torch.testing.assert_close(back.lm_head.weight.detach(), target.head)


def test_fresh_is_a_function_of_its_seed(target: Target) -> None:
    a, b, c = (Drafter.fresh(target, fresh_config(target), seed=s).fc.weight for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_pruned_vocabulary_maps_both_ways(target: Target) -> None:
    kept = torch.tensor([0, 3, 4, 9])
    drafter = Drafter.fresh(target, fresh_config(target, draft_vocab=4), kept=kept)
    assert drafter.draft_ids.tolist() == kept.tolist()
    assert drafter.d2t.tolist() == [0, 2, 2, 6]
    assert drafter.t2d.nonzero()[:, 0].tolist() == kept.tolist()
    assert drafter.draft_row[:10].tolist() == [0, -1, -1, 1, 2, -1, -1, -1, -1, 3]
    torch.testing.assert_close(drafter.lm_head.weight.detach(), target.head[kept])


def test_another_targets_embedding_is_refused(target: Target, tmp_path: Path) -> None:
    write(Drafter.fresh(target, fresh_config(target)), tmp_path / "d")
    with pytest.raises(DrafterRejected, match="vocab_size x hidden_size"):
        Drafter.from_checkpoint(tmp_path / "d", target.embedding[:-1])


@pytest.mark.parametrize(("layers", "expected"), [(16, (1, 7, 12)), (12, (1, 5, 8)), (36, (1, 17, 32))])
def test_feature_layers(layers: int, expected: tuple[int, int, int]) -> None:
    assert feature_layers(layers) == expected


def test_a_sharded_untied_target(target: Target, tmp_path: Path) -> None:
    head = torch.randn(40, 16)
    config = (target.config | {"tie_word_embeddings": False, "rope_theta": 5e5}) | {"rope_parameters": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parts = {
        "a.safetensors": {"model.embed_tokens.weight": target.embedding.bfloat16()},
        "b.safetensors": {"model.norm.weight": target.norm, "lm_head.weight": head},
    }
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    places = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = read_target(tmp_path)
    assert torch.equal(found.head, head)
    assert found.embedding.dtype == torch.float32
    assert fresh_config(found).rope_theta == 5e5


def test_a_target_without_the_tensor_is_refused_by_name(target: Target, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target.config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match=r"model\.embed_tokens\.weight"):
        read_target(tmp_path)
    with pytest.raises(SettingsError, match=r"config\.json"):
        read_target(tmp_path / "absent")
