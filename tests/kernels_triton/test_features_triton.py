"""Packing gives the twin's bytes, for every value that e4m3 can hold and between them."""

from __future__ import annotations

import pytest
import torch
from livedraft.kernels import features, features_triton
from torch import Tensor


def assert_same(values: Tensor, device: str) -> None:
    packed, scale = features.pack_rows(values)
    ours, our_scale = features_triton.pack_rows(values.to(device))
    assert torch.equal(our_scale.cpu(), scale)
    assert torch.equal(ours.cpu().view(torch.uint8), packed.view(torch.uint8))
    back = features_triton.unpack_rows(ours, our_scale)
    assert torch.equal(back.cpu(), features.unpack_rows(packed, scale))


def test_every_code_and_every_midpoint_between_two(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    values = torch.cat([finite, middle, middle * (1 + 2**-12), middle * (1 - 2**-12)])
    assert_same(values[None], device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_any_size(device: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(6, 37, generator=g) * torch.tensor([1e-6, 1e-2, 1.0, 30.0, 1e4, 1e8])[:, None]
    values[3, :5] = 0
    assert_same(torch.cat([values, torch.zeros(1, 37)]).to(dtype), device)
