"""A published EAGLE-3 drafter as one of ours.

Published folders differ: ``layers.0.`` or ``midlayer.``, with or without ``t2d`` and the target's embedding, one file
or shards, bfloat16 or float32.  What differs in arithmetic is refused with the reason, because an engine that skips
it would draft badly and nothing would say why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from livedraft.contracts import checkpoint
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.errors import DrafterRejected
from livedraft.trainer.target import Target

Json = dict[str, Any]

#: In some folders, and the target's or derived.
_UNUSED = {"embed_tokens.weight", "midlayer.self_attn.rotary_emb.inv_freq"}
#: Switches of later variants whose arithmetic is another.
_VARIANTS = ("norm_output", "fc_norm", "norm_before_fc", "norm_before_residual", "attention_bias", "mlp_bias")


def adopt(folder: Path, target: Target) -> tuple[DrafterConfig, dict[str, np.ndarray]]:
    """Config and tensors, by our names, float32.  Raises DrafterRejected naming the field or tensor, and why."""
    published = _read_config(folder)
    tensors = {_renamed(name): array for name, array in _read_tensors(folder).items()}
    config = _config(published, target, tensors)
    if (embedding := tensors.get("embed_tokens.weight")) is not None:
        wanted = tuple(target.embedding.shape)
        _require(embedding.shape == wanted, "tensor embed_tokens.weight: shape", embedding.shape, wanted)
    tensors = {name: array for name, array in tensors.items() if name not in _UNUSED}
    if "lm_head.weight" not in tensors and config.draft_vocab_size == config.vocab_size:
        tensors["lm_head.weight"] = target.head.numpy()  # engines take the target's there
    _complete_vocabulary(tensors, config)
    expected = checkpoint.tensor_shapes(config)
    for name, array in sorted(tensors.items()):
        if name not in expected:
            raise DrafterRejected(f"tensor {name}: not part of an EAGLE-3 drafter as engines run it")
        if array.shape != expected[name]:
            raise DrafterRejected(f"tensor {name}: shape {array.shape}, expected {expected[name]} by config.json")
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise DrafterRejected(f"tensor {name}: NaN or infinity")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise DrafterRejected(f"tensor {missing[0]}: missing")
    return config, tensors


def _read_config(folder: Path) -> Json:
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DrafterRejected(f"{folder}: config.json: {error}") from error
    if not isinstance(found, dict):
        raise DrafterRejected(f"{folder}: config.json: not an object")
    return found


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next((path.name for path in folder.glob("*.bin")), None)
        raise DrafterRejected(
            f"{folder}: {pickled} is a pickle, which can run any code when it is read; convert it to safetensors first"
            if pickled
            else f"{folder}: holds no .safetensors file"
        )
    if (index := folder / "model.safetensors.index.json").exists():
        try:
            named = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DrafterRejected(f"{index.name}: {error}") from error
        if absent := [name for name in named if folder / name not in files]:
            raise DrafterRejected(f"{index.name}: names {absent[0]}, which is not there")
        files = [folder / name for name in named]
    return {
        name: checkpoint.to_array(dtype, shape, data)
        for path in files
        for name, (dtype, shape, data) in checkpoint.read_tensors(path).items()
    }


def _renamed(name: str) -> str:
    name = name.removeprefix("model.")
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def _config(published: Json, target: Target, tensors: dict[str, np.ndarray]) -> DrafterConfig:
    architectures = published.get("architectures")
    if architectures != ["LlamaForCausalLMEagle3"]:
        raise DrafterRejected(f"config.json: architectures is {architectures}, expected LlamaForCausalLMEagle3")
    for name in _VARIANTS:
        if published.get(name):
            raise DrafterRejected(f"config.json: {name} is set; drafters of that variant compute otherwise than ours")
    layers, act = published.get("num_hidden_layers", 1), published.get("hidden_act", "silu")
    _require(layers == 1, "config.json: num_hidden_layers", layers, 1)
    _require(act == "silu", "config.json: hidden_act", act, "silu")
    vocab, hidden = target.embedding.shape
    for name, wanted in (("vocab_size", vocab), ("hidden_size", hidden), ("target_hidden_size", hidden)):
        found = published.get(name, wanted if name == "target_hidden_size" else None)
        _require(found == wanted, f"config.json: {name}", found, f"{wanted}, the target's")
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    _require(kind == "default", "config.json: rope_type", kind, "default: scaled rotary positions are not supported")
    _require_default_layers(published, target)
    try:
        heads = int(published["num_attention_heads"])
        return DrafterConfig(
            hidden_size=hidden,
            intermediate_size=int(published["intermediate_size"]),
            num_attention_heads=heads,
            num_key_value_heads=int(published.get("num_key_value_heads") or heads),
            head_dim=int(published.get("head_dim") or hidden // heads),
            vocab_size=vocab,
            draft_vocab_size=int(published.get("draft_vocab_size") or vocab),
            max_position_embeddings=int(
                published.get("max_position_embeddings") or target.config["max_position_embeddings"]
            ),
            rms_norm_eps=float(published.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or published.get("rope_theta") or 10000.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DrafterRejected(f"config.json: {type(error).__name__}: {error}") from error


def _require_default_layers(published: Json, target: Target) -> None:
    """SGLang's ids, in ``eagle_config``, name the blocks whose outputs are read; vLLM's, at the top, the next ones."""
    name, default = "eagle_aux_hidden_state_layer_ids", list(target.feature_layers)
    if ids := (published.get("eagle_config") or {}).get(name):
        _require(ids == default, f"config.json: eagle_config.{name}", ids, f"{default}, the default")
    if ids := published.get(name):
        _require(ids == [layer + 1 for layer in default], f"config.json: {name}", ids, "the default")


def _complete_vocabulary(tensors: dict[str, np.ndarray], config: DrafterConfig) -> None:
    """Make ``d2t`` int64, and ``t2d`` what it implies."""
    rows = np.arange(config.draft_vocab_size)
    if "d2t" not in tensors:
        if config.draft_vocab_size != config.vocab_size:
            raise DrafterRejected("tensor d2t: missing, and the vocabularies differ")
        tensors["d2t"] = np.zeros(len(rows), np.int64)
    d2t = tensors["d2t"] = tensors["d2t"].astype(np.int64)
    if d2t.shape != rows.shape:
        raise DrafterRejected(f"tensor d2t: shape {d2t.shape}, expected {rows.shape} by config.json")
    ids = rows + d2t
    if len(ids) and not (ids.min() >= 0 and ids.max() < config.vocab_size):
        raise DrafterRejected(f"tensor d2t: maps to a token outside the target's vocabulary of {config.vocab_size}")
    if len(np.unique(ids)) != len(ids):
        raise DrafterRejected("tensor d2t: maps two rows to one token")
    marked = np.zeros(config.vocab_size, bool)
    marked[ids] = True
    told = tensors.get("t2d")
    if told is not None and (told.shape != marked.shape or (told.astype(bool) != marked).any()):
        raise DrafterRejected("tensor t2d: does not mark the tokens that d2t maps to")
    tensors["t2d"] = marked


def _require(holds: bool, what: str, found: object, wanted: object) -> None:
    if not holds:
        raise DrafterRejected(f"{what} is {found}, expected {wanted}")
