"""Small targets and drafters made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.messages import Manifest
from livedraft.serving.local.place import find, revision
from livedraft.serving.local.target import load_tensors
from livedraft.serving.local.text import Text

BUNDLED = find("bundled")


def make_target(folder: Path, family: str, vocab_size: int = 64, kv_heads: int = 2, layers: int = 6) -> Path:
    """A random target of another family, with the bundled tokenizer beside it."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=2,
        initializer_range=0.25,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED / name, folder / name)
    return folder


def make_drafter(folder: Path, target: Path, *, seed: int = 0, draft_vocab: int | None = None) -> str:
    """A drafter that knows nothing; returns its checksum."""
    from transformers import AutoConfig

    raw = AutoConfig.from_pretrained(target)
    config = DrafterConfig(
        hidden_size=raw.hidden_size,
        intermediate_size=2 * raw.hidden_size,
        num_attention_heads=raw.num_attention_heads,
        num_key_value_heads=raw.num_key_value_heads,
        head_dim=raw.head_dim,
        vocab_size=raw.vocab_size,
        draft_vocab_size=draft_vocab or raw.vocab_size,
        max_position_embeddings=raw.max_position_embeddings,
    )
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    kept = np.sort(rng.permutation(config.vocab_size)[: config.draft_vocab_size])
    for name, shape in checkpoint.tensor_shapes(config).items():
        tensors[name] = (
            np.ones(shape, np.float32) if "norm" in name else (rng.standard_normal(shape) * 0.05).astype(np.float32)
        )
    tensors["d2t"] = kept - np.arange(config.draft_vocab_size)
    tensors["t2d"] = np.isin(np.arange(config.vocab_size), kept)
    weights = load_tensors(target)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).numpy()
    tensors["lm_head.weight"] = head[kept]
    manifest = checkpoint.write(
        folder,
        config,
        tensors,
        Manifest(tensors={}, target="test", target_revision=revision(target), tokenizer_hash=Text(target).hash),
    )
    return checkpoint.checksum(manifest.tensors)
