"""Tiny but complete drafter checkpoints for the tests of the registry, the gate's surroundings and the swap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from livedraft.contracts import checkpoint
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.messages import Manifest

CONFIG = DrafterConfig(
    hidden_size=8,
    intermediate_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=16,
    draft_vocab_size=10,
    max_position_embeddings=32,
)
MANIFEST = Manifest(tensors={}, target="tiny", target_revision="r1", tokenizer_hash="tok")


def tensors(seed: int = 0, config: DrafterConfig = CONFIG) -> dict[str, np.ndarray]:
    """Random float32 weights; the draft vocabulary is every token but 0..k, so that d2t is not all zero."""
    rng = np.random.default_rng(seed)
    skipped = config.vocab_size - config.draft_vocab_size
    arrays: dict[str, np.ndarray] = {}
    for name, shape in checkpoint.tensor_shapes(config).items():
        if name == "d2t":
            arrays[name] = np.full(shape, skipped, "<i8")
        elif name == "t2d":
            arrays[name] = np.arange(config.vocab_size) >= skipped
        else:
            arrays[name] = rng.standard_normal(shape).astype("<f4")
    return arrays


def write(folder: Path, seed: int = 0, manifest: Manifest = MANIFEST) -> Manifest:
    return checkpoint.write(folder, CONFIG, tensors(seed), manifest)
