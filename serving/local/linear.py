"""Matrix products whose cost and result hardly depend on how many rows they get.

Verification multiplies the same weights with a handful of rows.  ``F.linear`` reads them as they are stored, [o, i],
and from four rows on pays twice for it.  Stored the other way round, [i, o], a small matrix goes through the BLAS'
direct kernel, at next to no cost per call; one that no cache holds goes faster through oneDNN's prepacked product,
whose 15 us per call then do not show.  By five rows, with MKL on AVX-512, as stored, turned round and packed:
1024 x 192 takes 24, 14 and 31 us, 4096 x 192 217, 135 and 140, and 2048 x 2048 785 turned round and 681 packed.

A row's result must not depend on the rows beside it, or a token would depend on what it was verified with.  Both sum
in one order for any number of rows but one, which is another kernel's; so there are never fewer than two.  Measured
bit-equal for 1 to 128 rows, on one thread and on two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Most weights of a matrix that is turned round instead of packed.
_SMALL = 1 << 20
#: Rows the packed layout is chosen for.  Hints of 1 give a layout that rounds differently from all others.
_ROWS_HINT = 8

Linear = Callable[[Tensor], Tensor]


def frozen(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """``x [n, i] -> x @ weight.T + bias [n, o]`` for a ``weight [o, i]`` that stays; laid out for float32 on a CPU."""
    weight = weight.contiguous()
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: F.linear(x, weight, bias)
    packs = weight.numel() > _SMALL and torch._C._has_mkldnn
    product = _packed(weight, bias) if packs else _turned(weight, bias)
    return lambda x: product(x) if len(x) > 1 else product(x.expand(2, -1))[:1]


def halved(weight: Tensor) -> Linear:
    """As ``frozen`` from weights rounded to half precision, where this torch has a product that reads them so.

    Reading them is what a product of few rows takes its time for; what is drafted needs no more than half precision.
    4096 x 192 by one row: 58 us instead of 133.
    """
    if weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        return frozen(weight)
    layout = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None)
    product = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: product(x, layout)


def _turned(weight: Tensor, bias: Tensor | None) -> Linear:
    turned = weight.t().contiguous()
    if bias is None:
        return lambda x: torch.mm(x, turned)
    return lambda x: torch.addmm(bias, x, turned)


def _packed(weight: Tensor, bias: Tensor | None) -> Linear:
    layout = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, layout, bias, "none", [], "")
