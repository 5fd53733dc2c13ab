"""What a drafter's head says of a few named tokens and of all the rest together, without keeping all its logits.

A row names M token ids; its buckets are those ids and one more for everything else.  With z = hidden @ weight.T /
temperature, S the named ids and q = softmax(z):

    log q_b = z_b - log sum_j exp z_j  for b in S,        log q_rest = log sum_{j not in S} exp z_j - log sum_j exp z_j

and for G_b, the gradient of a loss by log q_b,

    dL/dz_i = G_i - q_i sum_b G_b  for i in S,            q_i (G_rest / q_rest - sum_b G_b)  elsewhere.

So every loss on buckets needs of the head only these numbers, [N, M + 1] in place of [N, V].  Chunks of rows are
worked on while their logits are in cache, after the fused linear cross-entropy of Liger-Kernel (Hsu et al. 2024,
arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: A loss per row: (rows asked for, f[n, M + 1] their log q) -> f[n].
Rule = Callable[[slice, Tensor], Tensor]


def log_buckets(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    inverse_temperature: Tensor,
    *,
    chunk: int = 512,
    low_precision: bool = False,
) -> tuple[Tensor, Tensor]:
    """f[N, M + 1] log q of each row's buckets, the rest last, and f[N] log of the softmax's denominator.

    Only the former carries a gradient, for which the logits are computed again.

    ``hidden`` f[N, H]; ``weight`` f[V, H]; ``ids`` i64[N, M] distinct rows of the head, -1 where there is none;
    ``inverse_temperature`` f[N].  A bucket without a token holds the log of the smallest positive number.
    ``low_precision`` multiplies in bfloat16 (faster where the CPU has tiles for it, slower elsewhere; logits keep
    8 bits of mantissa).
    """
    if hidden.is_cuda:
        from livedraft.kernels import buckets_triton

        return buckets_triton.log_buckets(hidden, weight, ids, inverse_temperature, low_precision)
    apply: Callable[..., tuple[Tensor, Tensor]] = _LogBuckets.apply
    return apply(hidden, weight, ids, inverse_temperature, chunk, low_precision)


def log_buckets_reference(
    hidden: Tensor, weight: Tensor, ids: Tensor, inverse_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """The specification of ``log_buckets``: all logits at once, gradients by autograd."""
    z = hidden @ weight.T * inverse_temperature[:, None]
    log_q = z.log_softmax(1)
    named = torch.zeros_like(log_q).scatter_add(1, ids.clamp(min=0), (ids >= 0).to(log_q.dtype)).bool()
    nothing = _nothing(log_q)
    kept = log_q.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, nothing)
    rest = log_q.masked_fill(named, nothing).logsumexp(1, keepdim=True)
    rest = torch.where(named.all(1, keepdim=True), nothing, rest)
    return torch.cat([kept, rest], 1), z.detach().logsumexp(1)


@dataclass(frozen=True)
class Graded:
    """What ``graded_buckets`` found.  Only ``total`` carries a gradient."""

    #: f[] sum over rows of weight x loss.
    total: Tensor
    #: f[N, M + 1]
    log_q: Tensor
    #: f[N] log of the softmax's denominator: log q_i = z_i - log_normaliser.
    log_normaliser: Tensor


def graded_buckets(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    inverse_temperature: Tensor,
    row_weight: Tensor,
    rule: Rule,
    *,
    chunk: int = 512,
    low_precision: bool = False,
) -> Graded:
    """``(row_weight * rule(all rows, log_buckets(...)[0])).sum()``, its gradient formed on the way forward.

    A third of the head's products fewer than ``log_buckets``, for losses that are a weighted sum over rows.
    """
    if hidden.is_cuda:
        log_q, normaliser = log_buckets(hidden, weight, ids, inverse_temperature, low_precision=low_precision)
        return Graded((row_weight * rule(slice(None), log_q)).sum(), log_q.detach(), normaliser)
    wants = tuple(torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _GradedBuckets.apply
    return Graded(*apply(hidden, weight, ids, inverse_temperature, row_weight, rule, chunk, low_precision, wants))


class _Look:
    """The buckets of a chunk of logits [n, V], which are overwritten with exponentials, later with a gradient."""

    def __init__(self, z: Tensor, ids: Tensor, inverse_temperature: Tensor) -> None:
        self._z, self._inverse_temperature = z, inverse_temperature
        self._absent = ids < 0
        self._ids = ids.clamp(min=0)
        z.mul_(inverse_temperature[:, None])
        top = z.amax(1, keepdim=True)
        z_named = z.sub_(top).gather(1, self._ids)
        z.exp_()
        # Taken out exactly: what is left at a named id is 0, and token 0 is untouched where an id is missing.
        self._e_named = z.gather(1, self._ids).masked_fill_(self._absent, 0)
        z.scatter_add_(1, self._ids, -self._e_named)
        self._e_rest = z.sum(1, keepdim=True)
        self._e_all = self._e_named.sum(1, keepdim=True) + self._e_rest
        log_all = self._e_all.log()
        nothing = _nothing(z)
        log_rest = (self._e_rest.clamp(min=torch.finfo(z.dtype).tiny).log() - log_all).clamp(min=nothing)
        named = (z_named - log_all).masked_fill(self._absent, nothing)
        self.log_q = torch.cat([named, log_rest], 1)
        self.log_normaliser = (top + log_all)[:, 0]

    def gradient(self, by_log_q: Tensor) -> Tensor:
        """[n, V] gradient by the unscaled logits, from that by ``log_q``; takes the logits' place."""
        by_log_q = by_log_q * self._inverse_temperature[:, None]
        named = by_log_q[:, :-1].masked_fill(self._absent, 0)
        rest = by_log_q[:, -1:].masked_fill(self._e_rest <= 0, 0)
        shared = (named.sum(1, keepdim=True) + rest) / self._e_all
        self._z.mul_(rest / self._e_rest.clamp(min=torch.finfo(rest.dtype).tiny) - shared)
        return self._z.scatter_add_(1, self._ids, (named - self._e_named * shared).masked_fill_(self._absent, 0))


class _LogBuckets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        inverse_temperature: Tensor,
        chunk: int,
        low_precision: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, ids, inverse_temperature)
        ctx.chunk, ctx.low_precision = chunk, low_precision
        log_q, log_normaliser = hidden.new_empty(len(hidden), ids.shape[1] + 1), hidden.new_empty(len(hidden))
        head = _Head(hidden, weight, (False, False), low_precision)
        for part in _parts(len(hidden), chunk):
            look = _Look(head.logits(part), ids[part], inverse_temperature[part])
            log_q[part], log_normaliser[part] = look.log_q, look.log_normaliser
        ctx.mark_non_differentiable(log_normaliser)
        return log_q, log_normaliser

    @staticmethod
    def backward(ctx: Any, by_log_q: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, inverse_temperature = ctx.saved_tensors
        head = _Head(hidden, weight, ctx.needs_input_grad[:2], ctx.low_precision)
        for part in _parts(len(hidden), ctx.chunk):
            look = _Look(head.logits(part), ids[part], inverse_temperature[part])
            head.learn(part, look.gradient(by_log_q[part]))
        return head.by_hidden, head.by_weight, None, None, None, None


class _GradedBuckets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        inverse_temperature: Tensor,
        row_weight: Tensor,
        rule: Rule,
        chunk: int,
        low_precision: bool,
        wants: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_q = hidden.new_empty(len(hidden), ids.shape[1] + 1)
        log_normaliser, total = hidden.new_empty(len(hidden)), hidden.new_zeros(())
        head = _Head(hidden, weight, wants, low_precision)
        for part in _parts(len(hidden), chunk):
            look = _Look(head.logits(part), ids[part], inverse_temperature[part])
            log_q[part], log_normaliser[part] = look.log_q, look.log_normaliser
            with torch.enable_grad():
                leaf = look.log_q.requires_grad_()
                loss = (row_weight[part] * rule(part, leaf)).sum()
            total += loss.detach()
            if any(wants):
                (by_log_q,) = torch.autograd.grad(loss, leaf)
                head.learn(part, look.gradient(by_log_q))
        ctx.save_for_backward(head.by_hidden, head.by_weight)
        ctx.mark_non_differentiable(log_q, log_normaliser)
        return total, log_q, log_normaliser

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_inputs = [None if g is None else by_total * g for g in ctx.saved_tensors]
        return *by_inputs, None, None, None, None, None, None, None


class _Head:
    """The products with the head, forward and back, in the precision asked for."""

    def __init__(self, hidden: Tensor, weight: Tensor, wants: tuple[bool, bool], low_precision: bool) -> None:
        self._low = low_precision
        self._factor = torch.bfloat16 if low_precision else hidden.dtype
        self._dtype = hidden.dtype
        self._hidden, self._weight = hidden.to(self._factor), weight.to(self._factor)
        self.by_hidden = torch.empty_like(hidden) if wants[0] else None
        self.by_weight = torch.zeros_like(weight) if wants[1] else None

    def logits(self, part: slice) -> Tensor:
        return (self._hidden[part] @ self._weight.T).to(self._dtype)

    def learn(self, part: slice, by_logits: Tensor) -> None:
        g = by_logits.to(self._factor)
        if self.by_hidden is not None:
            self.by_hidden[part] = g @ self._weight
        if self.by_weight is not None and self._low:
            self.by_weight += g.T @ self._hidden[part]
        elif self.by_weight is not None:
            self.by_weight.addmm_(g.T, self._hidden[part])


def _parts(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _nothing(like: Tensor) -> float:
    """log of the smallest positive number: a probability that adds nothing, yet whose products with 0 are 0."""
    return float(torch.tensor(torch.finfo(like.dtype).tiny, dtype=torch.float64).log())
