"""Attention of a forest: a row sees its sequence up to its root, its ancestors and itself, and nothing else.

Sequences of like shape share a call of torch's scaled dot-product attention, padded for it alone; no mask can leak
from one to another, because they are different entries of its batch.  The products around it run on packed rows.

Measured on one AVX-512 core, 16 sequences of 115 positions, 96 roots, four steps, forward and back: 83 ms; a loop over
sequences with products of our own 102 ms, with torch's attention 110 ms; all sequences in one row under a document
mask 869 ms, since this processor computes what the mask then hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from livedraft.trainer.unroll import Forest, Level

#: Sequences share a call while lengths and roots are at least this share of the longest's.
_ALIKE = 0.7


class ForestAttention:
    """Keys and values of the features, and of every level drafted so far.

    attention = ForestAttention(key, value, forest)
    attended = attention(q)                             # of the roots
    attention.descend(key, value, level)                # for each later level
    attended = attention(q)
    """

    def __init__(self, key: Tensor, value: Tensor, forest: Forest) -> None:
        roots = forest.levels[0].counts
        at = forest.positions[forest.root]
        self._groups = [_Group(key, value, group, forest.lengths, roots, at) for group in _alike(forest.lengths, roots)]
        self._counts = roots

    def descend(self, key: Tensor, value: Tensor, level: Level) -> None:
        """Go on to ``level``, whose rows have keys and values [n, kv heads, head_dim]."""
        for group in self._groups:
            group.descend(key, value, level, self._counts)
        self._counts = level.counts

    def __call__(self, q: Tensor) -> Tensor:
        """[n, heads, head_dim] -> [n, heads x head_dim]."""
        attended = torch.cat([group(q) for group in self._groups])
        order = torch.cat([group.rows for group in self._groups])
        return attended[order.argsort()].flatten(1)


class _Group:
    """Sequences that share a call, B of them."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        sequences: Sequence[int],
        lengths: Sequence[int],
        roots: Sequence[int],
        at: Tensor,
    ) -> None:
        self._sequences = sequences
        features = _Padded(sequences, lengths)
        self._keys, self._values = [features.fill(key)], [features.fill(value)]
        self._layout = _Padded(sequences, roots)
        # A row that only pads sees position 0: what it attends to is dropped, but must be something.
        self._seen = [torch.arange(features.width) <= self._layout.fill(at)[:, :, None]]

    @property
    def rows(self) -> Tensor:
        """i64 rows of the level that this group answers for, in the order in which it does."""
        return self._layout.rows

    def descend(self, key: Tensor, value: Tensor, level: Level, before: Sequence[int]) -> None:
        here = _Padded(self._sequences, level.counts)
        if level.parent is not None:
            first = torch.tensor([sum(before[:s]) for s in self._sequences])
            parent = (here.fill(level.parent) - first[:, None]).masked_fill(~here.real, 0)
            # The line above a row is its parent's.
            self._seen = [m.gather(1, parent[:, :, None].expand(-1, -1, m.shape[2])) for m in self._seen]
        itself = torch.eye(here.width, dtype=torch.bool).expand(len(self._sequences), -1, -1)
        self._seen.append(itself)
        self._keys.append(here.fill(key))
        self._values.append(here.fill(value))
        self._layout = here

    def __call__(self, q: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(
            self._layout.fill(q).transpose(1, 2),
            torch.cat(self._keys, 1).transpose(1, 2),
            torch.cat(self._values, 1).transpose(1, 2),
            attn_mask=torch.cat(self._seen, 2)[:, None],
            enable_gqa=True,
        )
        return self._layout.take(attended.transpose(1, 2))


class _Padded:
    """[B, width] places for some sequences' rows of a packed array; a place that only pads repeats row 0."""

    def __init__(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        ends = torch.tensor(counts).cumsum(0)
        mine = torch.tensor(sequences)
        count = torch.tensor(counts)[mine]
        self.width = int(count.max())
        place = torch.arange(self.width)
        self.real = place < count[:, None]
        self._index = torch.where(self.real, (ends[mine] - count)[:, None] + place, 0).flatten()
        self._shape = (len(sequences), self.width)
        self.rows = self._index[self.real.flatten()]
        self._whole = bool(self.real.all())

    def fill(self, packed: Tensor) -> Tensor:
        """[rows, *] -> [B, width, *]."""
        return packed.index_select(0, self._index).view(*self._shape, *packed.shape[1:])

    def take(self, padded: Tensor) -> Tensor:
        """[B, width, *] -> [rows of the group, *]."""
        flat = padded.flatten(0, 1)
        return flat if self._whole else flat.index_select(0, torch.nonzero(self.real.flatten())[:, 0])


def _alike(lengths: Sequence[int], roots: Sequence[int]) -> list[list[int]]:
    """Sequences in groups, longest first, none of them much shorter than the first of its group."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], -roots[i])):
        longest = groups[-1][0] if groups else None
        if (
            longest is not None
            and lengths[i] >= _ALIKE * lengths[longest]
            and min(roots[i], roots[longest]) >= _ALIKE * max(roots[i], roots[longest])
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
