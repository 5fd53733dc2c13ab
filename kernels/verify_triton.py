"""Verification of a batch on a GPU: one program per sequence, the decisions of ``kernels.verify`` bit for bit.

``verify_chains_reference`` and ``verify_trees_reference`` there are the specifications; given the same uniforms both
accept the same nodes and draw the same bonus token.  Sums over the vocabulary are in float64, as ``sampling.draw``'s.

Under ``TRITON_INTERPRET=1`` the same source runs on a CPU, slowly, for tests.  Not yet run on a GPU.
"""

# Triton's language has no types to write down.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 256


def verify_chains(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """As ``kernels.verify.verify_chains_reference``."""
    batch, n = tokens.shape
    accepted = torch.empty(batch, dtype=torch.int64, device=p.device)
    bonus = torch.empty_like(accepted)
    _chains[(batch,)](
        p.contiguous(), q.contiguous(), tokens.contiguous(), lengths, uniforms.double().contiguous(), accepted, bonus,
        n, p.shape[2], TOKENS=_TOKENS,
    )  # fmt: skip
    return accepted, bonus


def verify_trees(
    p: Tensor, tokens: Tensor, parents: Tensor, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kernels.verify.verify_trees_reference``."""
    batch, n = tokens.shape
    path = torch.full((batch, n), -1, dtype=torch.int64, device=p.device)
    accepted = torch.empty(batch, dtype=torch.int64, device=p.device)
    bonus = torch.empty_like(accepted)
    _trees[(batch,)](
        p.contiguous(), tokens.contiguous(), parents.contiguous(), lengths, uniforms.double().contiguous(),
        path, accepted, bonus, n, p.shape[2], TOKENS=_TOKENS, NODES=triton.next_power_of_2(max(n, 1)),
    )  # fmt: skip
    return path, accepted, bonus


@triton.jit
def _weights(p, q, start, vocab, subtract, TOKENS: tl.constexpr):
    """f64[TOKENS] of p, or of max(p - q, 0)."""
    token = start + tl.arange(0, TOKENS)
    w = tl.load(p + token, mask=token < vocab, other=0.0)
    if subtract:
        w = tl.maximum(w - tl.load(q + token, mask=token < vocab, other=0.0), 0.0)
    return w.to(tl.float64)


@triton.jit
def _draw(p, q, uniform, vocab, subtract, TOKENS: tl.constexpr):
    """First token at which the running sum of weights passes ``uniform`` of its total."""
    total = tl.zeros((), dtype=tl.float64)
    for start in range(0, vocab, TOKENS):
        total += tl.sum(_weights(p, q, start, vocab, subtract, TOKENS), 0)
    # Rounding can empty the residual only where p and q agree; then p itself is the residual's limit.
    residual = subtract & (total > 0)
    if subtract & (total == 0):
        for start in range(0, vocab, TOKENS):
            total += tl.sum(_weights(p, q, start, vocab, False, TOKENS), 0)
    point = uniform * total
    passed = tl.zeros((), dtype=tl.float64)
    found = vocab
    last = 0
    for start in range(0, vocab, TOKENS):
        w = _weights(p, q, start, vocab, residual, TOKENS)
        token = start + tl.arange(0, TOKENS)
        running = passed + tl.cumsum(w, 0)
        found = tl.minimum(found, tl.min(tl.where((running > point) & (token < vocab), token, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(w > 0, token, 0), 0))
        passed += tl.sum(w, 0)
    # Rounded up to the total: the last token that has any weight.
    return tl.where(found < vocab, found, last)


@triton.jit
def _chains(
    p,  # f32[B, n + 1, vocab]
    q,  # f32[B, n, vocab]
    tokens,  # i64[B, n]
    lengths,  # i64[B]
    uniforms,  # f64[B, n + 1]
    accepted,  # i64[B] out
    bonus,  # i64[B] out
    n, vocab, TOKENS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + b)
    count = tl.zeros((), dtype=tl.int64)
    standing = length > 0
    while standing:
        token = tl.load(tokens + b * n + count)
        chance = tl.load(p + (b * (n + 1) + count) * vocab + token).to(tl.float64)
        proposed = tl.load(q + (b * n + count) * vocab + token).to(tl.float64)
        stands = tl.load(uniforms + b * (n + 1) + count) * proposed < chance
        count += stands.to(tl.int64)
        standing = stands & (count < length)
    fell = count < length
    # A fallen one has used a uniform of its own.
    uniform = tl.load(uniforms + b * (n + 1) + count + fell.to(tl.int64))
    row_p = p + (b * (n + 1) + count) * vocab
    row_q = q + (b * n + tl.minimum(count, n - 1)) * vocab
    tl.store(accepted + b, count)
    tl.store(bonus + b, _draw(row_p, row_q, uniform, vocab, fell, TOKENS))


@triton.jit
def _trees(
    p,  # f32[B, n + 1, vocab]
    tokens,  # i64[B, n]
    parents,  # i64[B, n]
    lengths,  # i64[B]
    uniforms,  # f64[B, n + 1]
    path,  # i64[B, n] out
    accepted,  # i64[B] out
    bonus,  # i64[B] out
    n, vocab, TOKENS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + b)
    node = tl.arange(0, NODES)
    inside = node < length
    token = tl.load(tokens + b * n + node, mask=inside, other=-1)
    parent = tl.load(parents + b * n + node, mask=inside, other=-2)
    at = tl.full((), -1, dtype=tl.int64)
    count = tl.zeros((), dtype=tl.int64)
    drawn = tl.zeros((), dtype=tl.int64)
    walking = length >= 0
    while walking:
        row = p + (b * (n + 1) + at + 1) * vocab
        drawn = _draw(row, row, tl.load(uniforms + b * (n + 1) + count), vocab, False, TOKENS).to(tl.int64)
        following = tl.max(tl.where((parent == at) & (token == drawn) & inside, node, -1), 0).to(tl.int64)
        walking = following >= 0
        if walking:
            tl.store(path + b * n + count, following)
            at = following
            count += 1
    tl.store(accepted + b, count)
    tl.store(bonus + b, drawn)
