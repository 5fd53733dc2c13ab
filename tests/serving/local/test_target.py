"""The target computes what transformers computes, whatever rows share a pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from livedraft.contracts.errors import BadRequest
from livedraft.serving.local.place import find
from livedraft.serving.local.propose import Proposal, tree_layout
from livedraft.serving.local.target import Target
from transformers import AutoModelForCausalLM

from tests.serving.local.models import BUNDLED, make_target


def reference(folder: Path, tokens: list[int]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
    return out.logits[0], tuple(h[0] for h in out.hidden_states)


@pytest.fixture(scope="module", params=["bundled", "llama", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "bundled":
        return BUNDLED
    return make_target(tmp_path_factory.mktemp(request.param), request.param)


def test_logits_and_features_are_those_of_transformers(folder: Path) -> None:
    target = Target(folder, slots=2)
    tokens = [5, 9, 3, 60, 12, 33, 7, 8, 21, 40]
    logits, states = reference(folder, tokens)
    ours, features = target.forward(torch.tensor(tokens), target.layout([0], len(tokens), slot=1))
    torch.testing.assert_close(ours, logits, atol=2e-4, rtol=1e-4)
    wanted = torch.cat([states[layer + 1] for layer in target.config.feature_layers], -1)
    torch.testing.assert_close(features, wanted, atol=2e-4, rtol=1e-4)


def test_a_tree_row_sees_what_its_branch_alone_would_show_it(folder: Path) -> None:
    target = Target(folder, slots=2)
    prefix, chosen = [5, 9, 3, 60], [12, 33, 7, 8, 21]
    proposal = Proposal(tokens=tuple(chosen), parents=(-1, -1, 0, 2, 1), tree=True)
    target.forward(torch.tensor(prefix[:-1]), target.layout([0], 3))
    depths, ancestors = tree_layout([proposal], 6)
    tokens = torch.tensor([prefix[-1], *chosen])
    logits, _ = target.forward(tokens, target.layout([3], 6, depths=depths, ancestors=ancestors))
    for row, branch in {0: [], 1: [12], 2: [33], 3: [12, 7], 4: [12, 7, 8], 5: [33, 21]}.items():
        expected = reference(folder, prefix + branch)[0][-1]
        torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)


def test_rows_of_different_sequences_do_not_meet(folder: Path) -> None:
    target = Target(folder, slots=3)
    texts = [[5, 9, 3, 60, 2, 9], [12, 33, 7], [8, 21, 40, 11]]
    for slot, text in enumerate(texts):
        target.forward(torch.tensor(text[:-1]), target.layout([0], len(text) - 1, slot=slot))
    rows = torch.tensor([text[-1] for text in texts])
    logits, _ = target.forward(rows, target.layout([len(t) - 1 for t in texts], 1))
    for row, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(row, reference(folder, text)[0][-1], atol=2e-4, rtol=1e-4)


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(BadRequest, match="gpt2"):
        Target(tmp_path, slots=1)


def test_a_target_that_is_nowhere_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadRequest, match="no/such-model"):
        find("no/such-model")
