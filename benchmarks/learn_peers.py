"""Our side of the peers' trainers: traces in the form that they read, checkpoints that they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import feature_values, to_numpy
from livedraft.trainer.model import Drafter, Norm
from livedraft.trainer.target import Target, fresh_config
from torch import Tensor, nn


def load_checkpoint(folder: Path, target: Target) -> Drafter:
    """A drafter that we or a peer wrote."""
    if (folder / "peer.json").exists():
        return PeerDrafter.from_folder(folder, target)
    return Drafter.from_checkpoint(folder, target.embedding)


class PeerDrafter(Drafter):
    """speculators' EAGLE-3 with the switches that it has on by default (version 0.9.0, models/eagle3)."""

    def __init__(self, config: DrafterConfig, embedding: Tensor, switches: dict[str, bool]) -> None:
        super().__init__(config, embedding)
        eps = config.rms_norm_eps
        self.input_norm: nn.Module = nn.Identity()
        if switches["norm_before_fc"]:
            self.input_norm = Norm(3 * config.hidden_size, eps)
        self.normed_residual = switches["norm_before_residual"]
        self.output_norm: nn.Module = nn.Identity()
        if switches["norm_output"]:
            # What is fed back is what the head reads: normed once, in ``write``.
            self.output_norm, self.norm = self.norm, _Normed(config.hidden_size, eps)

    @classmethod
    def from_folder(cls, folder: Path, target: Target) -> PeerDrafter:
        """The drafter in a folder that ``benchmarks/peers/run_speculators.py`` wrote."""
        from safetensors.torch import load_file

        switches = json.loads((folder / "peer.json").read_bytes())
        tensors = load_file(folder / "model.safetensors")
        drafter = cls(fresh_config(target), target.embedding, switches)
        named = {(f"output_{name}" if switches["norm_output"] and name == "norm.weight" else name): tensor
                 for name, tensor in tensors.items()}  # fmt: skip
        missing, unknown = drafter.load_state_dict(named, strict=False)
        if unknown or set(missing) - {"d2t", "t2d", "norm.weight"}:
            raise ValueError(f"{folder}: missing {missing}, unknown {unknown}")
        return drafter

    def fuse(self, features: Tensor) -> Tensor:
        """As ``Drafter.fuse``, of normed features."""
        fused: Tensor = super().fuse(self.input_norm(features))
        return fused

    def write(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """As ``Drafter.write``, its residual and its output normed."""
        residual = self.midlayer.hidden_norm(hidden) if self.normed_residual else hidden
        written: Tensor = self.output_norm(super().write(residual, attended))
        return written


class _Normed(Norm):
    """Leaves alone what is normed already."""

    def forward(self, x: Tensor) -> Tensor:
        """[*, size] -> [*, size]."""
        return x


def convert(traces: Sequence[Trace], target: Path, place: Path) -> None:
    """Write traces as a list of samples in the fields of speculators' data set (hidden states, ids, mask).

    Features are the recorded ones.  The target's last hidden states, which peers turn into its distribution, are not
    part of a trace; they are computed here, by transformers, as a peer's own capture would have done while serving.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    last: list[Tensor] = []
    # The last block's output, before the final norm: what vLLM hands to speculators.
    model.model.layers[-1].register_forward_hook(lambda _m, _i, output: last.append(_hidden(output)))
    with torch.inference_mode():
        samples = []
        for trace in traces:
            sample = sample_of(trace)
            last.clear()
            model.model(sample["input_ids"][None])
            samples.append(sample | {"verifier_last_hidden_states": last[0][0].clone()})
    half = place.with_suffix(".half")
    torch.save(samples, half)
    half.replace(place)


def sample_of(trace: Trace) -> dict[str, Tensor]:
    """ids i64[T], features f[T, 3H], mask of the output tokens bool[T].

    Nothing reads the features of the last token, which the engine never computed: they are zero.
    """
    prompt, output = (to_numpy(a).astype(np.int64) for a in (trace.prompt, trace.output))
    features = feature_values(trace.features)[: len(prompt) + len(output) - 1]
    mask = np.arange(len(prompt) + len(output)) >= len(prompt)
    return {
        "input_ids": torch.from_numpy(np.concatenate([prompt, output])),
        "hidden_states": torch.from_numpy(np.concatenate([features, np.zeros_like(features[:1])])),
        "loss_mask": torch.from_numpy(mask),
    }


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
