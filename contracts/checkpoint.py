"""The drafter checkpoint: a folder that SGLang and vLLM load as EAGLE-3, proven before anything is touched.

    config.json         architecture LlamaForCausalLMEagle3
    model.safetensors   fc, midlayer.*, norm, lm_head, d2t, t2d   (embeddings are the target's)
    manifest.json       sha256 per tensor, target, tokenizer hash, parent, offsets trained through

Source: EAGLE-3 (Li et al. 2025, arXiv 2503.01840), section 3; names and shapes as in SGLang's and vLLM's
``llama_eagle3``.  The first drafting step reads, at position t, the target's features of t and the embedding of
token t+1; later steps read the drafter's own pre-norm output.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from livedraft.contracts.errors import DrafterRejected
from livedraft.contracts.messages import Manifest

#: Floating types: unsigned integers of their width, and the exponent bits that are all set in NaN and infinity.
_SAFETENSORS_TYPES = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
_OTHER_TYPES = {"I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}

T = TypeVar("T")


class DrafterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``config.json`` that fix an EAGLE-3 drafter's shapes and arithmetic."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    architectures: tuple[str, ...] = ("LlamaForCausalLMEagle3",)
    model_type: str = "llama"
    num_hidden_layers: int = 1
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False

    def to_json(self) -> dict[str, Any]:
        """``config.json`` with both spellings of the rotary settings that engines read."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields | {
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "torch_dtype": "float32",
        }


def tensor_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with its shape.  ``d2t`` is int64, ``t2d`` bool, the rest floating point."""
    h, i, hd = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
    return {
        "fc.weight": (h, 3 * h),
        "midlayer.hidden_norm.weight": (h,),
        "midlayer.input_layernorm.weight": (h,),
        "midlayer.mlp.down_proj.weight": (h, i),
        "midlayer.mlp.gate_proj.weight": (i, h),
        "midlayer.mlp.up_proj.weight": (i, h),
        "midlayer.post_attention_layernorm.weight": (h,),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * h),
        "midlayer.self_attn.o_proj.weight": (h, q),
        "midlayer.self_attn.q_proj.weight": (q, 2 * h),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * h),
        "norm.weight": (h,),
        "lm_head.weight": (config.draft_vocab_size, h),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }


def checksum(tensors: Mapping[str, str]) -> str:
    """One sha256 (hex) for a set of named tensor hashes: the identity of a drafter's weights."""
    return hashlib.sha256("".join(f"{n}:{h}\n" for n, h in sorted(tensors.items())).encode()).hexdigest()


def lineage(tensors: Mapping[str, str]) -> str:
    """What versions with one draft vocabulary have in common, by a manifest's tensor hashes: 12 digits of its map's."""
    return tensors.get("d2t", "")[:12]


def hash_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """sha256 (hex) of each tensor's little-endian bytes."""
    return {name: hashlib.sha256(np.ascontiguousarray(t).tobytes()).hexdigest() for name, t in tensors.items()}


def write(folder: Path, config: DrafterConfig, tensors: Mapping[str, np.ndarray], manifest: Manifest) -> Manifest:
    """Write a checkpoint folder atomically and durably: complete or absent, whatever dies.

    ``tensors`` holds float32 weights, int64 ``d2t`` and bool ``t2d``; ``manifest.tensors`` is filled in here.
    Raises FileExistsError when ``folder`` exists, DrafterRejected when a tensor is missing, misshapen or of
    another type.
    """
    from safetensors.numpy import save_file

    expected = tensor_shapes(config)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise DrafterRejected(f"tensor {wrong[0]}: shape {found.get(wrong[0])}, expected {expected.get(wrong[0])}")
    for name, tensor in tensors.items():
        if tensor.dtype != (wanted := {"d2t": "int64", "t2d": "bool"}.get(name, "float32")):
            raise DrafterRejected(f"tensor {name}: type {tensor.dtype}, expected {wanted}")
    if folder.exists():
        raise FileExistsError(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest = msgspec.structs.replace(manifest, tensors=hash_tensors(tensors))
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, half / "model.safetensors")
        (half / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
        (half / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        for path in half.iterdir():
            path.chmod(0o644)
            _fsync(path)
        half.chmod(0o755)
        _fsync(half)
        half.rename(folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return manifest


def verify(
    folder: Path,
    *,
    target: str | None = None,
    target_revision: str | None = None,
    tokenizer_hash: str | None = None,
    like: DrafterConfig | None = None,
) -> tuple[DrafterConfig, Manifest]:
    """Prove a checkpoint folder whole: files, names, shapes, types, hashes, finite values, the right target.

    ``like`` is the config of the drafter in service; the candidate must have its shapes.  Raises
    DrafterRejected naming what is wrong.  Needs no torch.
    """
    config = _decode(folder / "config.json", DrafterConfig)
    manifest = _decode(folder / "manifest.json", Manifest)
    if config.architectures != ("LlamaForCausalLMEagle3",):
        raise DrafterRejected(f"config.json: architectures is {config.architectures}, expected LlamaForCausalLMEagle3")
    if target is not None and manifest.target != target:
        raise DrafterRejected(f"manifest.json: trained for target {manifest.target!r}, this engine serves {target!r}")
    if target_revision is not None and manifest.target_revision != target_revision:
        raise DrafterRejected(
            f"manifest.json: trained for revision {manifest.target_revision} of the target, this is {target_revision}"
        )
    if tokenizer_hash is not None and manifest.tokenizer_hash != tokenizer_hash:
        raise DrafterRejected("manifest.json: tokenizer_hash differs from the target's: another vocabulary")
    if like is not None and tensor_shapes(like) != tensor_shapes(config):
        raise DrafterRejected("config.json: shapes differ from the drafter in service")
    expected = tensor_shapes(config)
    tensors = read_tensors(folder / "model.safetensors")
    if unknown := sorted(manifest.tensors.keys() - tensors.keys() - expected.keys()):
        raise DrafterRejected(f"manifest.json: names tensor {unknown[0]}, which is not part of an EAGLE-3 drafter")
    for name, (dtype, shape, data) in tensors.items():
        if name not in expected:
            raise DrafterRejected(f"tensor {name}: not part of an EAGLE-3 drafter")
        if shape != expected[name]:
            raise DrafterRejected(f"tensor {name}: shape {shape}, expected {expected[name]}")
        wanted = {"d2t": "I64", "t2d": "BOOL"}.get(name)
        if wanted and dtype != wanted:
            raise DrafterRejected(f"tensor {name}: type {dtype}, expected {wanted}")
        if not wanted:
            if dtype not in _SAFETENSORS_TYPES:
                raise DrafterRejected(f"tensor {name}: type {dtype}, expected one of {', '.join(_SAFETENSORS_TYPES)}")
            bits, exponent = _SAFETENSORS_TYPES[dtype]
            if (np.frombuffer(data, bits) & exponent == exponent).any():
                raise DrafterRejected(f"tensor {name}: NaN or infinity")
        if manifest.tensors.get(name) != hashlib.sha256(data).hexdigest():
            raise DrafterRejected(f"tensor {name}: sha256 differs from manifest.json")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise DrafterRejected(f"tensor {missing[0]}: missing from model.safetensors")
    _verify_vocabulary(tensors["d2t"][2], tensors["t2d"][2])
    return config, manifest


def _verify_vocabulary(d2t: memoryview, t2d: memoryview) -> None:
    """Draft id i means target id i + d2t[i]; t2d marks exactly those ids.  An engine indexes with them unchecked."""
    offsets = np.frombuffer(d2t, "<i8")
    ids = np.arange(len(offsets)) + offsets
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(t2d)):
        raise DrafterRejected(f"tensor d2t: maps to a token outside the target's vocabulary of {len(t2d)}")
    marked = np.zeros(len(t2d), "u1")
    marked[ids] = 1
    if len(np.unique(ids)) != len(ids) or (marked != np.frombuffer(t2d, "u1")).any():
        raise DrafterRejected("tensor t2d: does not mark the tokens that d2t maps to")


def read_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    """Name -> (safetensors type, shape, bytes) of a safetensors file, without interpreting the bytes."""
    try:
        blob = path.read_bytes()
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length])
        header.pop("__metadata__", None)
        body = memoryview(blob)[8 + length :]
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(body):
                raise ValueError(f"{name} ends past the file")
            dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
            if dtype in _BYTES and end - start != math.prod(shape) * _BYTES[dtype]:
                raise ValueError(f"{name} has {end - start} bytes, not those of {dtype} {list(shape)}")
            tensors[name] = (dtype, shape, body[start:end])
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DrafterRejected(f"{path.name}: {error}") from error


def load(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a verified folder: float32 weights (whatever they were stored as), int64 d2t, bool t2d."""
    return {name: to_array(*stored) for name, stored in read_tensors(folder / "model.safetensors").items()}


def to_array(dtype: str, shape: tuple[int, ...], data: memoryview) -> np.ndarray:
    """What ``read_tensors`` found, as a copy; floating point becomes float32.  Raises DrafterRejected."""
    if dtype == "BF16":
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype == "F16":
        flat = np.frombuffer(data, "<f2").astype("<f4")
    elif stored := {"F32": "<f4", **_OTHER_TYPES}.get(dtype):
        flat = np.frombuffer(data, stored).copy()
    else:
        raise DrafterRejected(f"a tensor of type {dtype}, expected one of {', '.join(_BYTES)}")
    return flat.reshape(shape)


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise DrafterRejected(f"{path.name}: {error}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
