"""The drafter as serving runs it: one EAGLE-3 layer over the target's features (Li et al. 2025, section 3).

Position t of its cache pairs the target's features of t with the embedding of token t + 1, and its output there
predicts token t + 2.  Committed positions come from the target (``extend``); draft steps go on from the drafter's
own output (``step``), and what they leave in the cache is overwritten by the next ``extend``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from livedraft.contracts import checkpoint
from livedraft.contracts.checkpoint import DrafterConfig
from livedraft.contracts.errors import DrafterRejected
from livedraft.serving.local.attention import Rotary, attend, layout, normalised
from livedraft.serving.local.kv import KVCache
from livedraft.serving.local.linear import Linear, frozen, halved
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DrafterWeights:
    """A checkpoint laid out for serving; immutable, so that a swap is the exchange of one reference."""

    config: DrafterConfig
    version: str
    checksum: str
    fc: Linear
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    head: Linear
    #: int64 [draft_vocab] target id of each draft row; None when the two vocabularies are one.
    target_ids: Tensor | None


def load(
    folder: Path,
    version: str,
    *,
    target_revision: str | None = None,
    tokenizer_hash: str | None = None,
    like: DrafterConfig | None = None,
) -> DrafterWeights:
    """Verify a checkpoint folder and lay it out.  Raises DrafterRejected naming what is wrong with it."""
    config, manifest = checkpoint.verify(
        folder, target_revision=target_revision, tokenizer_hash=tokenizer_hash, like=like
    )
    arrays = checkpoint.load(folder)
    held = checkpoint.checksum(manifest.tensors)
    t = {name.removesuffix(".weight").removeprefix("midlayer."): torch.from_numpy(a) for name, a in arrays.items()}
    ids = t["d2t"] + torch.arange(config.draft_vocab_size)
    if len(ids) and (ids.min() < 0 or ids.max() >= config.vocab_size):
        raise DrafterRejected("tensor d2t: points outside the target's vocabulary")
    hd = config.head_dim
    qkv = torch.cat(
        [
            Rotary.paired(t["self_attn.q_proj"], hd) * hd**-0.5,
            Rotary.paired(t["self_attn.k_proj"], hd),
            t["self_attn.v_proj"],
        ]
    )
    gate_up = torch.cat([t["mlp.gate_proj"], t["mlp.up_proj"]])
    whole = config.draft_vocab_size == config.vocab_size and bool((t["d2t"] == 0).all())
    return DrafterWeights(
        config=config,
        version=version,
        checksum=held,
        fc=frozen(t["fc"]),
        qkv=frozen(qkv * torch.cat([t["input_layernorm"], t["hidden_norm"]])),
        out=frozen(t["self_attn.o_proj"]),
        gate_up=frozen(gate_up * t["post_attention_layernorm"]),
        down=frozen(t["mlp.down_proj"]),
        head=halved(t["lm_head"] * t["norm"]),
        target_ids=None if whole else ids,
    )


class Drafter:
    """Weights that may be exchanged at any step, with the caches that outlive them.

    Keys left by an older version stay where they are: they cost acceptance for a few tokens, never correctness.
    """

    def __init__(self, weights: DrafterWeights, embedding: Tensor, *, slots: int, length: int) -> None:
        self.weights = weights
        self._embedding = embedding
        c = weights.config
        self.cache = KVCache(1, slots, c.num_key_value_heads, length, c.head_dim, torch.float32, embedding.device)
        inverse = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        self._rotary = Rotary(inverse, length)

    def extend(self, features: Tensor, following: Tensor, starts: list[int], take: Tensor, slot: int = 0) -> Tensor:
        """Read R committed positions of each sequence; returns the pre-norm outputs [B, H] at rows ``take``.

        features: [B*R, 3d] of positions starts[b] + i; following: int64 [B*R], the tokens one further on; take:
        int64 [B] flat rows.
        """
        rows = len(following) // len(starts)
        return self._layer(self.weights.fc(features), following, starts, rows, slot)[take]

    def step(self, hidden: Tensor, tokens: Tensor, starts: list[int]) -> Tensor:
        """One draft step: pre-norm outputs [B, H] and the tokens [B] drafted from them -> the next outputs [B, H]."""
        return self._layer(hidden, tokens, starts, 1, 0)

    def branch(
        self, hidden: Tensor, tokens: Tensor, start: int, depths: Tensor, ancestors: Tensor, slot: int
    ) -> Tensor:
        """One level of a tree of one sequence: R nodes so far -> outputs [R, H].

        ``ancestors`` bool [1, R, R]; ``depths`` [1, R] from the first drafted node.  The whole tree is run again at
        each level, which for one layer is cheaper than keeping books.
        """
        return self._layer(hidden, tokens, [start], len(tokens), slot, depths, ancestors)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, draft_vocab] float32."""
        return self.weights.head(normalised(hidden, self.weights.config.rms_norm_eps))

    def _layer(
        self,
        hidden: Tensor,
        tokens: Tensor,
        starts: list[int],
        rows: int,
        slot: int,
        depths: Tensor | None = None,
        ancestors: Tensor | None = None,
    ) -> Tensor:
        w, c = self.weights, self.weights.config
        both = torch.stack([self._embedding[tokens], hidden], 1)
        x = normalised(both.flatten(0, 1), c.rms_norm_eps).view(len(tokens), -1)
        where = layout(
            self.cache,
            self._rotary,
            slot=slot,
            starts=starts,
            rows=rows,
            groups=c.num_attention_heads // c.num_key_value_heads,
            depths=depths,
            ancestors=ancestors,
        )
        mixed = w.out(attend(w.qkv(x), c.num_attention_heads, c.head_dim, self.cache, 0, where)).add_(hidden)
        gate, up = w.gate_up(normalised(mixed, c.rms_norm_eps)).chunk(2, -1)
        return mixed.add_(w.down(F.silu(gate).mul_(up)))
