"""``kernels.features`` on a GPU: one pass that finds a row's scale and packs it, one that unpacks.

Rounding is written out on the bits, to nearest and to even, because processors differ in whether they convert to e4m3
at all; ``pack_rows`` in ``kernels.features`` is the specification, and both give the same bytes.

Under ``TRITON_INTERPRET=1`` the same source runs on a CPU, slowly, for tests.  Not yet run on a GPU.
"""

# Triton's language has no types to write down.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def pack_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """As ``kernels.features.pack_rows``."""
    n, d = values.shape
    packed = torch.empty(n, d, dtype=torch.uint8, device=values.device)
    scale = torch.empty(n, dtype=torch.float32, device=values.device)
    # Widened here: interpreted Triton has no bfloat16 arithmetic.
    _pack[(n,)](values.float().contiguous(), packed, scale, d, WIDTH=triton.next_power_of_2(d))
    return packed.view(torch.float8_e4m3fn), scale


def unpack_rows(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As ``kernels.features.unpack_rows``."""
    n, d = packed.shape
    values = torch.empty(n, d, dtype=torch.float32, device=packed.device)
    _unpack[(n,)](packed.view(torch.uint8).contiguous(), scale, values, d, WIDTH=triton.next_power_of_2(d))
    return values.to(dtype)


@triton.jit
def _pack(
    values,  # f32[n, d]
    packed,  # u8[n, d] out
    scale,  # f32[n] out
    d, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    x = tl.load(values + row * d + column, mask=column < d, other=0.0)
    largest = tl.max(tl.abs(x), 0)
    by = tl.div_rn(largest, 448.0)
    by = tl.where(by > 0, by, 1.0)
    tl.store(scale + row, by)
    y = tl.minimum(tl.abs(tl.div_rn(x, tl.zeros_like(x) + by)), 448.0)
    bits = y.to(tl.int32, bitcast=True)
    # Normal numbers (2^-6 and above): 20 of 23 bits of mantissa rounded away, and the exponent's bias 127 made 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below, steps of 2^-9: adding 2^14 leaves a float32 just those, rounded to even; 8 of them are the least normal.
    steps = (y + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(y < 0.015625, steps, normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    tl.store(packed + row * d + column, (code | sign).to(tl.uint8), mask=column < d)


@triton.jit
def _unpack(
    packed,  # u8[n, d]
    scale,  # f32[n]
    values,  # f32[n, d] out
    d, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    code = tl.load(packed + row * d + column, mask=column < d, other=0).to(tl.int32)
    below = (code & 0x7F).to(tl.float32) * 0.001953125
    normal = (((code & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    size = tl.where((code & 0x78) == 0, below, normal)
    y = tl.where((code & 0x80) != 0, -size, size)
    tl.store(values + row * d + column, y * tl.load(scale + row), mask=column < d)
