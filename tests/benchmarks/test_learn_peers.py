"""Traces in the peers' form, and drafters in the form that peers write."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from livedraft.benchmarks.learn_peers import load_checkpoint, sample_of
from livedraft.serving.local.place import find
from livedraft.traces.arrays import to_numpy
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import Target, fresh_config, read_target
from safetensors.torch import save_file

from tests.trainer.conftest import make_trace

SWITCHES = ("norm_before_fc", "norm_output", "norm_before_residual")


def test_a_sample_has_the_features_of_all_tokens_but_the_last_and_asks_for_the_output_alone() -> None:
    trace = make_trace([1, 2, 3], [((), (), (), 7), ((4,), (-1,), (False,), 8)])
    sample = sample_of(trace)
    prompt, output = to_numpy(trace.prompt).tolist(), to_numpy(trace.output).tolist()
    assert sample["input_ids"].tolist() == prompt + output
    assert sample["loss_mask"].tolist() == [False] * len(prompt) + [True] * len(output)
    features = sample["hidden_states"]
    assert features.shape[0] == len(prompt) + len(output)
    assert features[:-1].abs().sum(1).min() > 0
    assert features[-1].abs().sum() == 0


def _peer(folder: Path, target: Target, *, on: bool) -> Path:
    drafter = Drafter.fresh(target, fresh_config(target), seed=5)
    tensors = {name: t.clone() for name, t in drafter.state_dict().items() if name not in ("d2t", "t2d")}
    if on:
        tensors["input_norm.weight"] = torch.full((3 * drafter.config.hidden_size,), 2.0)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "peer.json").write_text(json.dumps(dict.fromkeys(SWITCHES, on)))
    return folder


def test_a_peers_drafter_without_its_switches_computes_what_ours_does(tmp_path: Path) -> None:
    target = read_target(find("bundled"))
    ours, theirs = (
        Drafter.fresh(target, fresh_config(target), seed=5),
        load_checkpoint(_peer(tmp_path / "peer", target, on=False), target),
    )
    hidden, attended = torch.randn(2, 4, ours.config.hidden_size)
    attended = attended[:, : ours.midlayer.self_attn.o_proj.in_features]
    features = torch.randn(4, 3 * ours.config.hidden_size)
    assert torch.equal(ours.fuse(features), theirs.fuse(features))
    assert torch.equal(ours.norm(ours.write(hidden, attended)), theirs.norm(theirs.write(hidden, attended)))


def test_its_switches_norm_what_goes_in_what_comes_out_and_the_residual(tmp_path: Path) -> None:
    target = read_target(find("bundled"))
    theirs = load_checkpoint(_peer(tmp_path / "peer", target, on=True), target)
    size = theirs.config.hidden_size
    features = torch.randn(4, 3 * size)
    assert torch.allclose(theirs.fuse(features), theirs.fuse(1000 * features), atol=1e-5)
    hidden = torch.randn(4, size)
    attended = torch.zeros(4, theirs.midlayer.self_attn.o_proj.in_features)
    written = theirs.write(hidden, attended)
    assert torch.allclose(written, theirs.write(10 * hidden, attended), atol=1e-4)
    assert torch.equal(theirs.norm(written), written)
    gain = dict(theirs.named_parameters())["output_norm.weight"]
    assert torch.allclose((written / gain).square().mean(1), torch.ones(4), atol=1e-3)
