"""A drafter as SGLang holds it: fused projections with loaders of their own, sharded over ranks, embedding borrowed.

Hand-made after the conventions of SGLang's models: ``load_weights`` maps a checkpoint's names to parameters, each of
which may carry a ``weight_loader(parameter, tensor, shard)``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from livedraft.contracts.checkpoint import DrafterConfig
from torch import Tensor, nn

_FUSED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
_FUSED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # type: ignore[dict-item]


class _Fused(nn.Module):
    """Several output shards in one parameter; each rank holds its part of every shard."""

    def __init__(self, width: int, sizes: dict[Any, int], rank: int, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = {shard: size // ranks for shard, size in sizes.items()}
        self.rank = rank
        self.weight = nn.Parameter(torch.zeros(sum(self.sizes.values()), width, dtype=dtype), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: Tensor, loaded: Tensor, shard: Any) -> None:
        size, offset = self.sizes[shard], 0
        for name, other in self.sizes.items():
            if name == shard:
                break
            offset += other
        here = parameter.data.narrow(0, offset, size)
        part = loaded.narrow(0, self.rank * size, size)
        assert here.shape == part.shape
        here.copy_(part)


class _Attention(nn.Module):
    def __init__(self, c: DrafterConfig, rank: int, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.qkv_proj = _Fused(2 * c.hidden_size, {"q": q, "k": kv, "v": kv}, rank, ranks, dtype)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=False, dtype=dtype)


class _Mlp(nn.Module):
    def __init__(self, c: DrafterConfig, rank: int, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = _Fused(c.hidden_size, {0: c.intermediate_size, 1: c.intermediate_size}, rank, ranks, dtype)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False, dtype=dtype)


class _Layer(nn.Module):
    def __init__(self, c: DrafterConfig, rank: int, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = _Attention(c, rank, ranks, dtype)
        self.mlp = _Mlp(c, rank, ranks, dtype)
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            setattr(self, name, nn.RMSNorm(c.hidden_size, dtype=dtype))


class _Body(nn.Module):
    def __init__(self, c: DrafterConfig, rank: int, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * c.hidden_size, c.hidden_size, bias=False, dtype=dtype)
        self.layers = nn.ModuleList([_Layer(c, rank, ranks, dtype)])
        self.norm = nn.RMSNorm(c.hidden_size, dtype=dtype)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size, dtype=dtype)


class Drafter(nn.Module):
    """The model; ``pad`` rows of the head belong to no token."""

    def __init__(
        self, c: DrafterConfig, *, rank: int = 0, ranks: int = 1, pad: int = 8, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(**c.to_json())
        self.model = _Body(c, rank, ranks, dtype)
        self.lm_head = nn.Linear(c.hidden_size, c.draft_vocab_size + pad, bias=False, dtype=dtype)
        self.lm_head.weight.weight_loader = _load_head  # type: ignore[attr-defined]
        self.hot_token_id: Tensor | None = None
        self.requires_grad_(False)

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name == "d2t":
                self.hot_token_id = tensor + torch.arange(len(tensor))
            if name in ("d2t", "t2d"):
                continue
            name = name.replace("midlayer", "layers.0")
            name, shard = next(
                ((name.replace(part, fused), (shard,)) for part, (fused, shard) in _FUSED.items() if part in name),
                (name, ()),
            )
            name = name if name in parameters else f"model.{name}"
            if name in parameters:
                getattr(parameters[name], "weight_loader", _load)(parameters[name], tensor, *shard)


def _load(parameter: Tensor, tensor: Tensor) -> None:
    assert parameter.shape == tensor.shape
    parameter.data.copy_(tensor)


def _load_head(parameter: Tensor, tensor: Tensor) -> None:
    parameter[: len(tensor)].data.copy_(tensor)
    parameter[len(tensor) :].data.fill_(0)


def target_of(drafter: Drafter) -> nn.Module:
    """A target whose embedding the drafter has borrowed."""
    target = nn.Module()
    target.embed_tokens = drafter.model.embed_tokens
    return target
