"""Attention over slots for a few rows each: the part that target and drafter share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from livedraft.serving.local.kv import KVCache
from torch import Tensor

_ONE = torch.ones(1, 1, 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of one forward pass stand: B sequences in consecutive slots, R rows each.

    rotations: complex64 [B*R, 1, head_dim/2]; rows: as ``KVCache.rows``; mask: [B*kv_heads, R*groups, length],
    0 where a row may attend and -inf elsewhere, None where all may; keys and values: as ``KVCache.views``.
    """

    batch: int
    rotations: Tensor
    rows: Tensor
    mask: Tensor | None
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Rotary:
    """Rotary embedding as one complex product (Su et al. 2021), for heads stored with paired components."""

    def __init__(self, inverse_frequencies: Tensor, positions: int, scaling: float = 1.0) -> None:
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies.float()[None]
        #: complex64 [positions, head_dim / 2]
        self.table = torch.polar(torch.full_like(angles, scaling), angles)

    @staticmethod
    def paired(weight: Tensor, head_dim: int) -> Tensor:
        """Reorder rows [heads * head_dim, ...] from transformers' halves (x_i, x_{i+d/2}) to adjacent pairs.

        Queries and keys are reordered alike, so their products stay what they were.
        """
        rest = weight.shape[1:]
        return weight.view(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(-1, *rest)


def layout(
    cache: KVCache,
    rotary: Rotary,
    *,
    slot: int,
    starts: list[int],
    rows: int,
    groups: int,
    depths: Tensor | None = None,
    ancestors: Tensor | None = None,
) -> Layout:
    """Lay out ``rows`` new rows for each sequence, its first at position ``starts[b]``.

    A chain (``ancestors`` None): row i stands at position start + i and sees all before it and itself.  A tree:
    ``depths`` [B, rows] are offsets of the rotary position, and row i sees the rows j of its own proposal with
    ``ancestors[b, i, j]`` (bool [B, rows, rows], self included) besides everything before ``start``.
    """
    if len(starts) == 1 and ancestors is None:
        return _one_chain(cache, rotary, slot, starts[0], rows, groups)
    batch = len(starts)
    first = torch.tensor(starts, device=cache.data.device)[:, None]
    stands = first + cache.places[:rows] if rows > 1 else first  # [B, R] place in the cache
    length = min(cache.length, max(starts) + rows)
    turned = stands if depths is None else first + depths
    hidden = cache.places[:length] > stands[..., None]  # [B, R, L]
    if ancestors is not None:
        for b, start in enumerate(starts):
            hidden[b, :, start : start + rows] = ~ancestors[b]
    mask = torch.where(hidden, cache.never, cache.always)
    if groups > 1 or cache.kv_heads > 1:  # each row for every query head: a view, where there is one row only
        shape = (batch, cache.kv_heads, rows, groups, length)
        mask = mask[:, None, :, None].expand(shape).reshape(batch * cache.kv_heads, rows * groups, length)
    keys, values = cache.views(slot, batch, length)
    return Layout(
        batch=batch,
        rotations=rotary.table[turned.flatten()][:, None],
        rows=cache.rows((cache.starts[slot : slot + batch] + stands).flatten()),
        mask=mask,
        keys=keys,
        values=values,
    )


def _one_chain(cache: KVCache, rotary: Rotary, slot: int, start: int, rows: int, groups: int) -> Layout:
    """``layout`` of a single chain, from views: a draft step is so short that its book-keeping would show."""
    length = min(cache.length, start + rows)
    mask = None
    if rows > 1:
        mask = torch.zeros(rows, groups, length, device=cache.data.device)
        mask[:, :, start:] = torch.full((rows, rows), float("-inf"), device=mask.device).triu_(1)[:, None]
        mask = mask.view(1, rows * groups, length).expand(cache.kv_heads, -1, -1)
    keys, values = cache.views(slot, 1, length)
    return Layout(
        batch=1,
        rotations=rotary.table[start : start + rows, None],
        rows=cache.run(slot, start, rows),
        mask=mask,
        keys=keys,
        values=values,
    )


def attend(qkv: Tensor, heads: int, head_dim: int, cache: KVCache, layer: int, where: Layout) -> Tensor:
    """Rotate, store and attend: qkv [B*R, (heads + 2*kv_heads) * head_dim] -> [B*R, heads * head_dim].

    Queries come scaled by 1/sqrt(head_dim) (folded into their weights).
    """
    n, kv_heads = qkv.shape[0], cache.kv_heads
    split = qkv.view(n, heads + 2 * kv_heads, head_dim)
    turned = torch.view_as_complex(split[:, : heads + kv_heads].view(n, heads + kv_heads, head_dim // 2, 2))
    turned.mul_(where.rotations)
    cache.write(layer, where.rows, split[:, heads:])
    rows, groups = n // where.batch, heads // kv_heads
    queries = split[:, :heads].view(where.batch, rows, kv_heads, groups, head_dim)
    queries = queries.transpose(1, 2).reshape(where.batch * kv_heads, rows * groups, head_dim)
    keys = where.keys[layer]
    scores = torch.bmm(queries, keys) if where.mask is None else torch.baddbmm(where.mask, queries, keys)
    weights = torch.softmax(scores, -1)
    mixed = torch.bmm(weights, where.values[layer]).view(where.batch, kv_heads, rows, groups, head_dim)
    return mixed.transpose(1, 2).reshape(n, heads * head_dim)


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension of [n, d]: RMSNorm without its gain (Zhang & Sennrich 2019).

    Gains are folded into the weights that follow.  As one batched dot product it is faster than ``F.rms_norm`` on a CPU
    at these sizes.
    """
    n, d = x.shape
    squares = torch.baddbmm(_ONE, x.view(n, 1, d), x.view(n, d, 1), beta=eps, alpha=1 / d)
    return x * squares.view(n, 1).rsqrt_()
