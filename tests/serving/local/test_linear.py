"""The products of the engine: right, and the same to the bit whatever rows stand beside a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from livedraft.serving.local.linear import frozen, halved

#: [o, i], one of each layout, and those of the bundled target.
SHAPES = [(64, 32), (320, 192), (1024, 192), (192, 512), (4096, 192), (1100, 1024)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_row_comes_out_the_same_whatever_stands_beside_it(shape: tuple[int, int], biased: bool) -> None:
    weight = torch.randn(shape)
    bias = torch.randn(shape[0]) if biased else None
    product = frozen(weight, bias)
    x = torch.randn(72, shape[1])
    whole = product(x)
    torch.testing.assert_close(whole, F.linear(x, weight, bias), atol=1e-3, rtol=1e-4)
    for rows in [*range(1, 41), 64]:
        assert torch.equal(product(x[:rows]), whole[:rows]), f"{rows} rows"
        assert torch.equal(product(x[-rows:]), whole[-rows:]), f"the last {rows} rows"


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_half_precision_is_that_of_the_weights_alone(rows: int) -> None:
    weight, x = torch.randn(256, 96) / 10, torch.randn(rows, 96)
    torch.testing.assert_close(halved(weight)(x), F.linear(x, weight.half().float()), atol=1e-4, rtol=1e-4)
