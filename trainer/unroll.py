"""Draft several steps from many roots at once: the computation that training and the gate share with serving.

Serving drafts from a root: the drafter's cache holds the committed positions up to the root's t, made from the
target's features; each later step reads the drafter's own output at the step before, at position t + k, and appends
to the cache (EAGLE-3's training-time test, arXiv 2503.01840, section 3.2).  What hangs on a root is a tree: the
committed text, and where it departs from that, what was proposed and rejected.  Rows of one step are a level; each
names its parent in the level before, so that a shared line is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from livedraft.trainer.attention import ForestAttention
from torch import Tensor

if TYPE_CHECKING:
    from livedraft.trainer.model import Drafter


@dataclass(frozen=True)
class Level:
    """One drafting step: n rows, those of a sequence together, sequences in the forest's order."""

    #: i64[n] token that each row reads.
    tokens: Tensor
    #: i64[n] its parent's row in the level before; None: row for row the same (and at the roots).
    parent: Tensor | None
    #: Rows of each sequence.
    counts: list[int]


@dataclass(frozen=True)
class Forest:
    """Trees to draft along, packed without padding: S positions in ``len(lengths)`` sequences, one tree per root.

    Sequence i owns the next ``lengths[i]`` positions and the next ``counts[i]`` rows of each level.
    """

    #: f[S, 3H] features of each position.
    features: Tensor
    #: i64[S] the token after each position.
    next_tokens: Tensor
    #: i64[S] place in the sequence.
    positions: Tensor
    lengths: list[int]
    #: i64[rows of level 0] packed index of the position whose features the root's step reads.
    root: Tensor
    #: One per step; the tokens of level 0 are ``next_tokens[root]``.
    levels: list[Level]


def unroll(drafter: Drafter, forest: Forest, depth: int) -> Iterator[Tensor]:
    """Pre-norm outputs [n, H] of levels 0 .. depth-1."""
    base = drafter.fuse(forest.features)
    q, key, value = drafter.read(base, forest.next_tokens, forest.positions)
    attention = ForestAttention(key, value, forest)
    at = forest.positions[forest.root]
    q, hidden = q[forest.root], base[forest.root]
    for step, level in enumerate(forest.levels[:depth]):
        if step:
            if level.parent is not None:
                hidden, at = hidden[level.parent], at[level.parent]
            at = at + 1
            q, key, value = drafter.read(hidden, level.tokens, at)
            attention.descend(key, value, level)
        hidden = drafter.write(hidden, attention(q))
        yield hidden
