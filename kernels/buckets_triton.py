"""``kernels.buckets.log_buckets`` on a GPU: logits live in registers only, a tile at a time.

Forward keeps a running sum of exponentials per row, as online softmax does (Milakov and Gimelshein 2018,
arXiv 1805.02867), once over the tokens that a row does not name, and picks the named ones out of the tiles.  Backward
computes each tile again and adds its share to the gradients at once (Cut Cross-Entropy: Wijmans et al. 2024,
arXiv 2411.09009).  Beside its inputs and their gradients it needs [N, M + 1] numbers.  ``log_buckets_reference`` is
the specification.

Under ``TRITON_INTERPRET=1`` the same source runs on a CPU, slowly, for tests.  Not yet run on a GPU.
"""

# Triton's language has no types to write down.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows, tokens and hidden units of a tile.
_ROWS, _TOKENS, _UNITS = 32, 64, 32


def log_buckets(
    hidden: Tensor, weight: Tensor, ids: Tensor, inverse_temperature: Tensor, low_precision: bool = False
) -> tuple[Tensor, Tensor]:
    """As ``kernels.buckets.log_buckets``: f[N, M + 1] with a gradient, and f[N] without; low precision is TF32."""
    apply: Callable[..., tuple[Tensor, Tensor]] = _LogSums.apply
    named, rest = apply(hidden, weight, ids, inverse_temperature, low_precision)
    nothing = float(torch.tensor(torch.finfo(named.dtype).tiny, dtype=torch.float64).log())
    z = torch.cat([torch.where(ids >= 0, named, -torch.inf), rest[:, None]], 1)
    normaliser = z.logsumexp(1, keepdim=True)
    return torch.where(z.isinf(), nothing, z - normaliser), normaliser.detach()[:, 0]


def _precision(low: bool) -> str:
    return "tf32" if low else "ieee"


class _LogSums(torch.autograd.Function):
    """f[N, M] logits of the named tokens, and f[N] log of the summed exponentials of all others' (-inf: no others)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, inverse_temperature: Tensor, low_precision: bool
    ) -> tuple[Tensor, Tensor]:
        hidden, weight, ids = hidden.contiguous(), weight.contiguous(), ids.contiguous()
        inverse_temperature = inverse_temperature.to(torch.float32).contiguous()
        n, units = hidden.shape
        m = ids.shape[1]
        named = torch.zeros(n, m, dtype=torch.float32, device=hidden.device)
        rest = torch.empty(n, dtype=torch.float32, device=hidden.device)
        _forward[(triton.cdiv(n, _ROWS),)](
            hidden, weight, ids, inverse_temperature, named, rest, n, len(weight), units, m,
            PRECISION=_precision(low_precision), ROWS=_ROWS, TOKENS=_TOKENS, UNITS=_UNITS,
        )  # fmt: skip
        ctx.save_for_backward(hidden, weight, ids, inverse_temperature, rest)
        ctx.low_precision = low_precision
        return named, rest

    @staticmethod
    def backward(ctx: Any, by_named: Tensor, by_rest: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, inverse_temperature, rest = ctx.saved_tensors
        n, units = hidden.shape
        # Atomic sums: in float32 whatever the inputs, and in an order that differs from run to run.
        by_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        unused = hidden
        _backward[(triton.cdiv(n, _ROWS), triton.cdiv(len(weight), _TOKENS))](
            hidden, weight, ids, inverse_temperature, rest,
            by_named.to(torch.float32).contiguous(), by_rest.to(torch.float32).contiguous(),
            unused if by_hidden is None else by_hidden, unused if by_weight is None else by_weight,
            n, len(weight), units, ids.shape[1],
            HIDDEN=by_hidden is not None, WEIGHT=by_weight is not None,
            PRECISION=_precision(ctx.low_precision), ROWS=_ROWS, TOKENS=_TOKENS, UNITS=_UNITS,
        )  # fmt: skip
        return (
            None if by_hidden is None else by_hidden.to(hidden.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
            None,
            None,
            None,
        )


@triton.jit
def _logits(
    hidden, weight, rows, tokens, n, vocab, units, PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """f[ROWS, TOKENS] products of a tile of hidden [n, units] with one of weight [vocab, units]."""
    z = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, units, UNITS):
        unit = start + tl.arange(0, UNITS)
        h = tl.load(
            hidden + rows[:, None] * units + unit[None, :],
            mask=(rows[:, None] < n) & (unit[None, :] < units),
            other=0.0,
        )
        w = tl.load(
            weight + tokens[:, None] * units + unit[None, :],
            mask=(tokens[:, None] < vocab) & (unit[None, :] < units),
            other=0.0,
        )
        z += tl.dot(h.to(tl.float32), tl.trans(w.to(tl.float32)), input_precision=PRECISION)
    return z


@triton.jit
def _forward(
    hidden,  # f[n, units]
    weight,  # f[vocab, units]
    ids,  # i64[n, m], -1 where there is none
    inverse_temperature,  # f[n]
    named,  # f[n, m] out: scaled logits of ids
    rest,  # f[n] out: log of the summed exponentials of all other tokens
    n, vocab, units, m,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < n
    scale = tl.load(inverse_temperature + rows, mask=inside, other=1.0)
    # Finite, so that a tile of nothing but named tokens gives exp(0) x 0 and not inf - inf.
    top = tl.full((ROWS,), -1e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, vocab, TOKENS):
        tokens = (start + tl.arange(0, TOKENS)).to(tl.int64)
        z = _logits(hidden, weight, rows, tokens, n, vocab, units, PRECISION, ROWS, TOKENS, UNITS) * scale[:, None]
        other = (tokens[None, :] < vocab) & inside[:, None]
        for j in range(m):
            wanted = tl.load(ids + rows * m + j, mask=inside, other=-1)
            hit = wanted[:, None] == tokens[None, :]
            here = (wanted >= start) & (wanted < start + TOKENS)
            tl.store(named + rows * m + j, tl.sum(tl.where(hit, z, 0.0), 1), mask=inside & here)
            other = other & (hit == 0)
        highest = tl.maximum(top, tl.max(tl.where(other, z, -1e30), 1))
        e = tl.where(other, tl.exp(tl.where(other, z - highest[:, None], 0.0)), 0.0)
        total = total * tl.exp(top - highest) + tl.sum(e, 1)
        top = highest
    tl.store(
        rest + rows, tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), -float("inf")), mask=inside
    )


@triton.jit
def _backward(
    hidden,  # f[n, units]
    weight,  # f[vocab, units]
    ids,  # i64[n, m]
    inverse_temperature,  # f[n]
    rest,  # f[n] as forward left it
    by_named,  # f[n, m] gradient of the loss by the named logits
    by_rest,  # f[n] and by rest
    by_hidden,  # f[n, units] sum
    by_weight,  # f[vocab, units] sum
    n, vocab, units, m,
    HIDDEN: tl.constexpr, WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = rows < n
    scale = tl.load(inverse_temperature + rows, mask=inside, other=0.0)
    z = _logits(hidden, weight, rows, tokens, n, vocab, units, PRECISION, ROWS, TOKENS, UNITS) * scale[:, None]
    log_rest = tl.load(rest + rows, mask=inside, other=0.0)
    others = tl.load(by_rest + rows, mask=inside & (log_rest > -1e30), other=0.0)
    # d rest / dz_i is the token's share of the rest; a named token has none.
    known = (tokens[None, :] < vocab) & inside[:, None]
    g = tl.where(known, tl.exp(tl.minimum(z - tl.where(log_rest > -1e30, log_rest, 0.0)[:, None], 0.0)), 0.0)
    g = g * others[:, None]
    for j in range(m):
        wanted = tl.load(ids + rows * m + j, mask=inside, other=-1)
        mine = tl.load(by_named + rows * m + j, mask=inside, other=0.0)
        g = tl.where(wanted[:, None] == tokens[None, :], mine[:, None], g)
    g = tl.where(known, g * scale[:, None], 0.0)
    for start in range(0, units, UNITS):
        unit = start + tl.arange(0, UNITS)
        at_hidden = rows[:, None] * units + unit[None, :]
        at_weight = tokens[:, None] * units + unit[None, :]
        row_mask = inside[:, None] & (unit[None, :] < units)
        token_mask = (tokens[:, None] < vocab) & (unit[None, :] < units)
        if HIDDEN:
            w = tl.load(weight + at_weight, mask=token_mask, other=0.0)
            share = tl.dot(g, w.to(tl.float32), input_precision=PRECISION)
            tl.atomic_add(by_hidden + at_hidden, share, mask=row_mask)
        if WEIGHT:
            h = tl.load(hidden + at_hidden, mask=row_mask, other=0.0)
            share = tl.dot(tl.trans(g), h.to(tl.float32), input_precision=PRECISION)
            tl.atomic_add(by_weight + at_weight, share, mask=token_mask)
