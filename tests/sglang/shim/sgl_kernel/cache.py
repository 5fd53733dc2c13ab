"""Where keys and values lie: ``req_to_token`` i32[requests, length] holds the cache slot of each position.

B requests; ``rows`` i64[B] are their rows of ``req_to_token``.  ``pool_len`` is its length, which a kernel needs for
its stride and torch does not.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def assign_req_to_token_pool_cpu(
    rows: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, pool_len: int
) -> None:
    """Give each request's positions ``start`` to ``end`` the next of ``slots``."""
    row, position = _ranges(rows, start, end)
    req_to_token[row, position] = slots[: len(row)].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    rows: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out: Tensor, pool_len: int
) -> None:
    """The slots of each request's positions ``start`` to ``end``, back to back, into ``out``."""
    row, position = _ranges(rows, start, end)
    out[: len(row)] = req_to_token[row, position].to(out.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    rows: Tensor, req_to_token: Tensor, seq_lens: Tensor, out: Tensor, pool_len: int, topk: int, num_steps: int
) -> None:
    """The slots of the ``topk * num_steps`` positions after each request's end, into ``out``."""
    assign_extend_cache_locs_cpu(rows, req_to_token, seq_lens, seq_lens + topk * num_steps, out, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, rows: Tensor, seq_lens: Tensor, topk: int, num_steps: int, pool_len: int
) -> Tensor:
    """A table with a row per branch, i32[B * topk, length]: the committed slots, then the branch's own draft slots.

    Branch t of a request drafts into the ``num_steps`` positions from ``seq_len + t * num_steps`` on.
    """
    table = req_to_token[rows].repeat_interleave(topk, 0)
    lengths = seq_lens.repeat_interleave(topk)[:, None]
    branch = torch.arange(topk).repeat(len(rows))[:, None]
    step = torch.arange(num_steps)
    own = table.gather(1, lengths + branch * num_steps + step)
    return table.scatter_(1, lengths + step, own)


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, slots: Tensor, out: Tensor) -> None:
    """The slots of accepted nodes (index -1: none) to the front of ``out``."""
    accepted = accept_index.flatten()
    kept = slots[accepted[accepted >= 0].long()]
    out[: len(kept)] = kept.to(out.dtype)


def copy_all_layer_kv_cache_cpu(pointers: Tensor, strides: Tensor, target: Tensor, source: Tensor) -> None:
    """Copy slots ``source`` to ``target`` in every layer: buffers at ``pointers``, ``strides`` bytes per slot.

    All are read before any is written, since the two may overlap.
    """
    if not len(target):
        return
    slots = 1 + int(torch.maximum(target.max(), source.max()))
    for pointer, stride in zip(pointers.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (slots * stride)).from_address(pointer)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).view(slots, stride)
        buffer[target.long()] = buffer[source.long()]


def _ranges(rows: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Row and position of every entry between ``start`` and ``end``, request by request."""
    sizes = (end - start).clamp(min=0).long()
    first = sizes.cumsum(0) - sizes
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    position = torch.arange(len(owner)) - first[owner] + start[owner]
    return rows[owner].long(), position.long()
