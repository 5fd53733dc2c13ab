"""Draft several steps from many roots at once: the computation that training and the gate share with serving.

Serving drafts from one root: the drafter's cache holds the committed positions up to the root's t, made from
the target's features; each later step reads the drafter's own previous output at position t + k and appends to
the cache.  So at step k, the query of a root sees the feature keys of positions 0..t and its *own* keys of
steps 1..k (EAGLE-3's training-time test, arXiv 2503.01840, section 3.2; there drawn as a mask).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from livedraft.trainer.model import Drafter
from torch import Tensor


@dataclass(frozen=True)
class Roots:
    """Chains to draft along, packed: S positions in ``len(lengths)`` sequences, C chains of D steps.

    Sequence i owns the next ``lengths[i]`` positions and the next ``chains[i]`` chains.
    """

    #: f[S, 3H] features of each position.
    features: Tensor
    #: i64[S] the token after each position.
    next_tokens: Tensor
    #: i64[S] place in the sequence.
    positions: Tensor
    lengths: list[int]
    chains: list[int]
    #: i64[C] packed index of the position whose features the chain's first step reads.
    root: Tensor
    #: i64[C, D] token read at each step; ``tokens[:, 0]`` is ``next_tokens[root]``.
    tokens: Tensor


def unroll(drafter: Drafter, roots: Roots, depth: int) -> Iterator[Tensor]:
    """Pre-norm outputs [C, H] of steps 0 .. depth-1 for every chain."""
    base = drafter.fuse(roots.features)
    q, key, value = drafter.read(base, roots.next_tokens, roots.positions)
    at = roots.positions[roots.root]
    q, hidden = q[roots.root], base[roots.root]
    attention = _Attention(key, value, roots, at)
    for step in range(depth):
        if step:
            q, key, value = drafter.read(hidden, roots.tokens[:, step], at + step)
            attention.append(key, value)
        hidden = drafter.write(hidden, attention(q))
        yield hidden


class _Attention:
    """Keys and values of the features, shared by a sequence's chains, and of each chain's own later steps."""

    def __init__(self, key: Tensor, value: Tensor, roots: Roots, at: Tensor) -> None:
        self.scale = key.shape[-1] ** -0.5
        self.chains = roots.chains
        # [kv heads, length, head_dim] of each sequence
        self.keys = [k.transpose(0, 1) for k in torch.split(key, roots.lengths)]
        self.values = [v.transpose(0, 1) for v in torch.split(value, roots.lengths)]
        places = zip(roots.lengths, torch.split(at, roots.chains), strict=True)
        self.hidden_from = [torch.arange(length) > place[:, None] for length, place in places]
        self.own_keys: list[Tensor] = []
        self.own_values: list[Tensor] = []

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add each chain's own step: [C, kv heads, head_dim]."""
        self.own_keys.append(key)
        self.own_values.append(value)

    def __call__(self, q: Tensor) -> Tensor:
        """[C, heads, head_dim] -> [C, heads x head_dim]."""
        heads, _, width = self.keys[0].shape
        # Query heads that share a key head become more queries of it: [C, kv heads, group, head_dim].
        grouped = (q * self.scale).view(len(q), heads, -1, width)
        own = self._own_scores(grouped)
        group, parts = grouped.shape[2], []
        both = zip(torch.split(grouped, self.chains), torch.split(own, self.chains), strict=True)
        for i, (rows, mine) in enumerate(both):
            flat = rows.permute(1, 2, 0, 3).reshape(heads, -1, width)
            scores = (flat @ self.keys[i].transpose(1, 2)).view(heads, group, len(rows), -1)
            scores = scores.masked_fill(self.hidden_from[i], float("-inf"))
            weights = torch.cat([scores, mine.permute(1, 2, 0, 3)], -1).softmax(-1)
            length = scores.shape[-1]
            out = (weights[..., :length].flatten(1, 2) @ self.values[i]).view(heads, group, len(rows), width)
            parts.append((out.permute(2, 0, 1, 3), weights[..., length:].permute(2, 0, 1, 3)))
        attended = torch.cat([out for out, _ in parts])
        if self.own_values:
            attended = attended + torch.cat([w for _, w in parts]) @ torch.stack(self.own_values, 2)
        return attended.flatten(1)

    def _own_scores(self, grouped: Tensor) -> Tensor:
        """[C, kv heads, group, own steps]."""
        if not self.own_keys:
            return grouped.new_empty(*grouped.shape[:3], 0)
        return grouped @ torch.stack(self.own_keys, -1)
