"""Matrix products whose cost and result hardly depend on how many rows they get.

Verification multiplies the same weights with a handful of rows.  A plain ``F.linear`` falls from a matrix-vector
to a matrix-matrix kernel at two rows and pays twice for it; oneDNN's prepacked product costs nearly the same for
one row as for eight, and its sums run in one order whatever the number of rows, so that a token's logits do not
depend on what it was verified with (measured bit-equal for 1 to 40 rows on AVX-512).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows the packed layout is chosen for.  Hints of 1 give a layout that rounds differently from all others.
_ROWS_HINT = 8

Linear = Callable[[Tensor], Tensor]


def packed(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """``x [n, i] -> x @ weight.T + bias [n, o]`` for a frozen ``weight [o, i]``; float32 on CPU is prepacked."""
    weight = weight.contiguous()
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch._C._has_mkldnn:
        return lambda x: F.linear(x, weight, bias)
    layout = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, layout, bias, "none", [], "")
