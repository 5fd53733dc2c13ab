"""Features in eight bits: how far they may be off."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from livedraft.kernels.features import pack_rows, unpack_rows


@given(st.integers(0, 100_000), st.floats(-20, 20))
def test_a_value_comes_back_within_a_sixteenth_or_a_step_of_its_row(seed: int, size: float) -> None:
    values = torch.randn(4, 33, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    packed, scale = pack_rows(values)
    back = unpack_rows(packed, scale, torch.float32)
    largest = values.abs().amax(1, keepdim=True)
    # e4m3: relative 2^-4 for normal numbers, half of 2^-9 of the scale below them.
    allowed = torch.maximum(values.abs() / 16, largest / 448 * 2**-10) * (1 + 1e-5)
    assert ((back - values).abs() <= allowed).all()
    assert packed.element_size() == 1


def test_zeros_and_bfloat16() -> None:
    values = torch.tensor([[0.0, 0.0], [448.0, -1.0]], dtype=torch.bfloat16)
    packed, scale = pack_rows(values)
    assert scale.tolist() == [1.0, 1.0]
    assert torch.equal(unpack_rows(packed, scale), values)
