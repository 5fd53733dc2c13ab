"""The EAGLE-3 drafter: one transformer layer over the target's features (Li et al. 2025, arXiv 2503.01840).

Sizes in the comments: H hidden, V target vocabulary, N rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from livedraft.contracts import checkpoint
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.errors import DrafterRejected
from livedraft.trainer.target import Target
from torch import Tensor, nn

#: Query, key and value rows of one drafting step: [N, heads, head_dim], rotary positions applied.
QKV = tuple[Tensor, Tensor, Tensor]


class Norm(nn.Module):
    """Root-mean-square norm with a gain, as in Llama."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[*, size] -> [*, size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    def __init__(self, c: DrafterConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2 * c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)


class _SwiGLU(nn.Module):
    def __init__(self, c: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, low: bool) -> Tensor:
        gate, up = _linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]), low).chunk(2, -1)
        return _linear(F.silu(gate) * up, self.down_proj.weight, low)


class _Layer(nn.Module):
    def __init__(self, c: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(c)
        self.mlp = _SwiGLU(c)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.hidden_norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)


class Drafter(nn.Module):
    """Parameters named as in ``contracts.checkpoint``; the target's embedding rides along, frozen and unsaved.

    A step at position t: ``hidden`` is ``fuse(features_t)`` on the first step and the previous step's output
    afterwards; ``read`` makes its query, key and value; attention is the caller's (see ``unroll``); ``write``
    gives the pre-norm output; ``lm_head`` on ``norm`` of it gives the logits over the draft vocabulary.
    """

    d2t: Tensor
    t2d: Tensor
    embedding: Tensor

    def __init__(self, config: DrafterConfig, embedding: Tensor) -> None:
        super().__init__()
        self.config = config
        #: Whether the matrix products of ``fuse``, ``read`` and ``write`` run in bfloat16 (weights stay float32).
        self.low_precision = False
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
        self.register_buffer("embedding", embedding, persistent=False)

    @classmethod
    def fresh(cls, target: Target, config: DrafterConfig, *, seed: int = 0, kept: Tensor | None = None) -> Drafter:
        """A drafter that knows nothing but the target's head.

        ``kept`` i64[draft vocabulary] are the target ids it can propose, ascending; by default the first
        ones, which in a byte-pair vocabulary are the most frequent merges.
        """
        drafter = cls(config, target.embedding)
        generator = torch.Generator().manual_seed(seed)
        kept = torch.arange(config.draft_vocab_size) if kept is None else kept
        with torch.no_grad():
            for parameter in drafter.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.02, generator=generator)
            # Raw hidden states are large, up to 100 and more: what fc makes of them must not drown the layer.
            drafter.fc.weight.mul_(0.01)
            drafter.lm_head.weight.copy_(target.head[kept])
            drafter.norm.weight.copy_(target.norm)
            drafter.d2t.copy_(kept - torch.arange(len(kept)))
            drafter.t2d.zero_()[kept] = True
        return drafter

    @classmethod
    def from_checkpoint(cls, folder: Path, embedding: Tensor) -> Drafter:
        """The drafter in ``folder``, verified.  Raises DrafterRejected, also for another target's vocabulary."""
        config, _ = checkpoint.verify(folder)
        if tuple(embedding.shape) != (config.vocab_size, config.hidden_size):
            raise DrafterRejected(
                f"config.json: vocab_size x hidden_size is {config.vocab_size} x {config.hidden_size}, "
                f"the target's embedding is {embedding.shape[0]} x {embedding.shape[1]}"
            )
        drafter = cls(config, embedding)
        drafter.load_state_dict({name: torch.from_numpy(array) for name, array in checkpoint.load(folder).items()})
        return drafter

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Copies of all tensors, by their names in a checkpoint."""
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in self.state_dict().items()}

    @property
    def draft_row(self) -> Tensor:
        """i64[V] row of the head that proposes each target id; -1 where none does."""
        rows = torch.full((self.config.vocab_size,), -1)
        rows[self.draft_ids] = torch.arange(self.config.draft_vocab_size)
        return rows

    @property
    def draft_ids(self) -> Tensor:
        """i64[draft vocabulary] target id that each row of the head proposes: ``i + d2t[i]``."""
        return torch.arange(self.config.draft_vocab_size) + self.d2t

    def fuse(self, features: Tensor) -> Tensor:
        """[N, 3H] target features -> [N, H] hidden rows of the first step."""
        return _linear(features, self.fc.weight, self.low_precision)

    def read(self, hidden: Tensor, tokens: Tensor, positions: Tensor) -> QKV:
        """Query, key, value of rows [N, H] that read ``tokens`` i64[N] at rotary ``positions`` i64[N]."""
        c, layer, attention = self.config, self.midlayer, self.midlayer.self_attn
        x = torch.cat([layer.input_layernorm(self.embedding[tokens]), layer.hidden_norm(hidden)], -1)
        fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        rows = _linear(x, fused, self.low_precision).view(len(x), -1, c.head_dim)
        heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        q, k, v = torch.split(rows, heads, 1)
        cos, sin = self._rotary(positions)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def write(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Pre-norm output [N, H] of rows whose attention gave ``attended`` [N, heads x head_dim]."""
        hidden = hidden + _linear(attended, self.midlayer.self_attn.o_proj.weight, self.low_precision)
        normed = self.midlayer.post_attention_layernorm(hidden)
        written: Tensor = hidden + self.midlayer.mlp(normed, self.low_precision)
        return written

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.config.head_dim, 2) / self.config.head_dim
        angles = positions[:, None].float() * self.config.rope_theta**-half
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos(), angles.sin()


def _linear(x: Tensor, weight: Tensor, low: bool) -> Tensor:
    if low:
        return F.linear(x.bfloat16(), weight.bfloat16()).float()
    return F.linear(x, weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention of Llama; ``x`` [N, heads, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
