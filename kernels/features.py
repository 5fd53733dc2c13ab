"""Features in half the bytes: 8-bit floats (e4m3) with one scale per row.

A row's largest magnitude is mapped to e4m3's largest, 448, so nothing saturates; what is above 2^-14.8 of that keeps
three bits of mantissa, at most 1/16 of relative error (Micikevicius et al. 2022, arXiv 2209.05433).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest finite e4m3.
_LARGEST = 448.0


def pack_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """f[n, d] of any float type -> float8_e4m3fn[n, d] and f32[n] scale: values are nearly packed x scale.

    A row of zeros, or of what divided by 448 is none, has scale 1.  Values must be finite.  The plain-torch
    specification, and the implementation off GPUs.
    """
    wide = values.float()
    largest = wide.abs().amax(1)
    scale = largest / _LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale[:, None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale


def unpack_rows(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse of ``pack_rows``, rounded to ``dtype``: [n, d]."""
    return (packed.float() * scale[:, None]).to(dtype)
