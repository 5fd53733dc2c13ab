"""Preallocated key/value memory: one slot per running request, the running ones always in front.

Because the first B slots are the running requests, a batch attends over a view; nothing is gathered per step.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values, [layers, 2, slots, kv_heads, length, head_dim]."""

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.data = torch.zeros(layers, 2, slots, kv_heads, length, head_dim, dtype=dtype, device=device)
        self.slots, self.kv_heads, self.length = slots, kv_heads, length
        #: int64 [length] and [slots, 1]: every position; the flat row of each slot's first key.
        self.places = torch.arange(length, device=device)
        self.starts = torch.arange(slots, device=device)[:, None] * kv_heads * length
        #: What a mask adds where a row may attend, and where not.
        self.always = torch.zeros((), device=device)
        self.never = torch.full((), float("-inf"), device=device)
        self._rows = [layer.view(-1, head_dim) for layer in self.data]
        which = torch.arange(2, device=device)[:, None] * slots * kv_heads * length
        head = torch.arange(kv_heads, device=device)[None] * length
        #: [2, kv_heads] flat row of (keys or values, head) at slot 0, position 0.
        self._offsets = which + head
        #: [slots, length, 2 * kv_heads] flat rows of every position.
        self._runs = (self.starts[..., None] + self.places[:, None] + self._offsets.flatten()).contiguous()

    def rows(self, places: Tensor) -> Tensor:
        """Flat row numbers [n * 2 * kv_heads] for ``write``; ``places`` [n] is slot * kv_heads * length + position."""
        return (places[:, None, None] + self._offsets).flatten()

    def run(self, slot: int, start: int, count: int) -> Tensor:
        """As ``rows`` for ``count`` positions of one slot from ``start`` on."""
        return self._runs[slot, start : start + count].view(-1)

    def write(self, layer: int, rows: Tensor, values: Tensor) -> None:
        """Store ``values`` [n, 2 * kv_heads, head_dim] (keys, then values) at ``rows``."""
        self._rows[layer].index_copy_(0, rows, values.reshape(-1, values.shape[-1]))

    def views(self, slot: int, batch: int, length: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of slots [slot, slot + batch), layer by layer: keys [batch * kv_heads, head_dim, length] and values
        [batch * kv_heads, length, head_dim].  Made once per pass: sixteen layers' slices would show in a step.
        """
        part = self.data[:, :, slot : slot + batch, :, :length].flatten(2, 3)
        return part[:, 0].transpose(-1, -2).unbind(0), part[:, 1].unbind(0)

    def keep(self, slot: int, start: int, sources: list[int]) -> None:
        """Make positions start, start+1, ... of a slot hold what positions ``sources`` hold: an accepted path."""
        if sources != list(range(start, start + len(sources))):
            index = torch.tensor(sources, device=self.data.device)
            self.data[:, :, slot, :, start : start + len(sources)] = self.data[:, :, slot, :, index]

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot over another."""
        self.data[:, :, destination, :, :length] = self.data[:, :, source, :, :length]
