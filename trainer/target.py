"""What a drafter needs of its target: configuration, embeddings, head.  Never the whole model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.errors import SettingsError
from torch import Tensor

#: What a config must say for a drafter to take its shapes from it.
_SHAPING = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)


@dataclass(frozen=True)
class Target:
    """The outer weights of a frozen target of H hidden units and V tokens, float32."""

    config: dict[str, Any]
    #: [V, H]
    embedding: Tensor
    #: [V, H]; the embedding itself where the target ties them.
    head: Tensor
    #: [H] gain of the final norm.
    norm: Tensor

    @property
    def feature_layers(self) -> tuple[int, int, int]:
        """0-based blocks whose outputs a drafter reads, as SGLang and vLLM default to: low, middle, high."""
        return feature_layers(self.config["num_hidden_layers"])


def feature_layers(num_hidden_layers: int) -> tuple[int, int, int]:
    """The default feature blocks of a target with so many layers (EAGLE-3, arXiv 2503.01840, section 3.1)."""
    return (1, num_hidden_layers // 2 - 1, num_hidden_layers - 4)


def read_target(folder: Path) -> Target:
    """The outer weights of a Hugging Face Llama or Qwen folder (safetensors, whole or in shards).

    Raises SettingsError naming the missing file or tensor.
    """
    config = read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise SettingsError(f"target {folder}: holds no .safetensors file; other formats are not read")
    embedding = _tensor(folder, "model.embed_tokens.weight")
    tied = config.get("tie_word_embeddings", False)
    return Target(
        config=config,
        embedding=embedding,
        head=embedding if tied else _tensor(folder, "lm_head.weight"),
        norm=_tensor(folder, "model.norm.weight"),
    )


def fresh_config(target: Target, *, intermediate_size: int = 0, draft_vocab: int = 0) -> DrafterConfig:
    """Shapes of a new drafter: the target's width and heads, one layer.

    ``intermediate_size`` 0 takes the target's; ``draft_vocab`` 0 keeps the whole vocabulary.
    """
    config = target.config
    heads = config["num_attention_heads"]
    vocab, hidden = target.embedding.shape
    rope = config.get("rope_parameters") or {}
    return DrafterConfig(
        hidden_size=hidden,
        intermediate_size=intermediate_size or config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=vocab,
        draft_vocab_size=min(draft_vocab or vocab, vocab),
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
    )


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Ids that end the target's output, by generation_config.json or config.json.  Raises SettingsError."""
    path = folder / "generation_config.json"
    found = (_read_json(path) if path.exists() else {}).get("eos_token_id") or read_config(folder).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return tuple(token for token in ids if isinstance(token, int))


def read_config(folder: Path) -> dict[str, Any]:
    """A target's ``config.json``.  Raises SettingsError when it is not that of a target for a drafter."""
    config = _read_json(folder / "config.json")
    if missing := [name for name in _SHAPING if name not in config]:
        kind = config.get("model_type")
        raise SettingsError(f"target {folder}: config.json has no {missing[0]}; model_type {kind} is no Llama or Qwen")
    if (layers := config["num_hidden_layers"]) < 4:
        raise SettingsError(f"target {folder}: {layers} layers, and a drafter reads three of at least 4")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found
    except (OSError, ValueError) as error:
        raise SettingsError(f"target {path.parent}: {path.name}: {error}") from error


def _tensor(folder: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        file = json.loads(index.read_bytes())["weight_map"][name] if index.exists() else "model.safetensors"
        with safe_open(folder / file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SettingsError(f"target {folder}: tensor {name}: {error}") from error
    return tensor.to(torch.float32)
