"""Forward KL from a sparse target to ``softmax(hidden @ weight.T)``, never holding all rows of logits.

The target of a row is its K likeliest ids with their probabilities, and one bucket holding the rest, so with
z = hidden @ weight.T / temperature, q = softmax(z), S the K ids and q_tail = 1 - sum_S q:

    KL = sum_S p (log p - log q) + p_tail (log p_tail - log q_tail)
    dKL/dz_i = q_i - p_i for i in S,   q_i (1 - p_tail / q_tail) outside

Bucketing can only lower a divergence (data processing inequality), and it is zero exactly when the bucketed
distributions agree.  The gradient is formed while the logits of a chunk are in cache, after the fused linear
cross-entropy of Liger-Kernel (Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """Sparse target distributions of N rows.  ``probs.sum(1) + tail`` is 1."""

    #: i64[N, K] rows of the head; -1 where there is none (then its probability is 0).
    ids: Tensor
    #: f[N, K]
    probs: Tensor
    #: f[N] probability of everything else.
    tail: Tensor
    #: f[N] 1 / temperature at which the probabilities were taken.
    inverse_temperature: Tensor

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids[rows], self.probs[rows], self.tail[rows], self.inverse_temperature[rows])


@dataclass(frozen=True)
class Divergence:
    """What ``sparse_forward_kl`` found.  Only ``total`` carries a gradient."""

    #: f[] sum over rows of weight x KL, in nats.
    total: Tensor
    #: f[N] KL of each row, unweighted.
    rows: Tensor
    #: f[N] log of the softmax's denominator: log q_i = z_i - log_normaliser.
    log_normaliser: Tensor
    #: f[N] sum of min(p, q) over the buckets: the chance that a proposal drawn from q is accepted.
    overlap: Tensor


def sparse_forward_kl(
    hidden: Tensor, weight: Tensor, target: TopK, row_weight: Tensor, *, chunk: int = 512, low_precision: bool = False
) -> Divergence:
    """Weighted sum of KL(target || softmax(hidden @ weight.T / temperature)) over rows.

    ``hidden`` f[N, H]; ``weight`` f[V, H]; ``row_weight`` f[N], constant.  ``low_precision`` multiplies in
    bfloat16 (faster where the CPU has tiles for it, slower elsewhere; logits keep 8 bits of mantissa).
    """
    wants = tuple(torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    apply: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _SparseForwardKL.apply
    return Divergence(*apply(hidden, weight, target, row_weight, chunk, low_precision, wants))


def sparse_forward_kl_reference(hidden: Tensor, weight: Tensor, target: TopK, row_weight: Tensor) -> Divergence:
    """The specification of ``sparse_forward_kl``: all logits at once, gradients by autograd."""
    logits = hidden @ weight.T * target.inverse_temperature[:, None]
    normaliser = logits.logsumexp(1)
    q = (logits - normaliser[:, None]).exp()
    valid = target.ids >= 0
    kept = torch.zeros_like(q).scatter_add(1, target.ids.clamp(min=0), valid.to(q.dtype)).bool()
    q_tail = q.masked_fill(kept, 0).sum(1)
    q_top = q.gather(1, target.ids.clamp(min=0)).masked_fill(~valid, 1)
    rows = (torch.xlogy(target.probs, target.probs) - torch.xlogy(target.probs, q_top)).sum(1)
    rows = rows + torch.xlogy(target.tail, target.tail) - torch.xlogy(target.tail, q_tail)
    overlap = torch.minimum(target.probs, q_top).sum(1) + torch.minimum(target.tail, q_tail)
    return Divergence((row_weight * rows).sum(), rows.detach(), normaliser.detach(), overlap.detach())


class _SparseForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: TopK,
        row_weight: Tensor,
        chunk: int,
        low_precision: bool,
        wants: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = len(hidden)
        rows, normaliser, overlap = (hidden.new_empty(n) for _ in range(3))
        factor = torch.bfloat16 if low_precision else hidden.dtype
        hidden_, weight_ = hidden.to(factor), weight.to(factor)
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight) if wants[1] else None
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            z = (hidden_[part] @ weight_.T).to(hidden.dtype)
            rows[part], normaliser[part], overlap[part] = _rows(z, target[part], row_weight[part])
            if any(wants):
                g = z.to(factor)
            if grad_hidden is not None:
                grad_hidden[part] = g @ weight_
            if grad_weight is not None and low_precision:
                grad_weight += g.T @ hidden_[part]
            elif grad_weight is not None:
                grad_weight.addmm_(g.T, hidden_[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(rows, normaliser, overlap)
        return (row_weight * rows).sum(), rows, normaliser, overlap

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [None if g is None else grad_total * g for g in (grad_hidden, grad_weight)]
        return *scaled, None, None, None, None, None


def _rows(z: Tensor, target: TopK, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL, log-normaliser and overlap of a chunk; ``z`` (logits) is overwritten with its weighted gradient."""
    valid = target.ids >= 0
    # A row's missing ids repeat one of its own: zeroing that one twice changes nothing.
    ids = torch.where(valid, target.ids, target.ids.amax(1, keepdim=True).clamp(min=0))
    z.mul_(target.inverse_temperature[:, None])
    top = z.amax(1, keepdim=True)
    z.sub_(top).exp_()
    e_top = z.gather(1, ids).masked_fill_(~valid, 0)
    z.scatter_(1, ids, 0)
    e_tail = z.sum(1)
    e_all = e_top.sum(1) + e_tail
    q_top = e_top / e_all[:, None]
    q_tail = e_tail / e_all
    tiny = torch.finfo(z.dtype).tiny
    kl = (torch.xlogy(target.probs, target.probs) - torch.xlogy(target.probs, q_top.clamp(min=tiny))).sum(1)
    kl += torch.xlogy(target.tail, target.tail) - torch.xlogy(target.tail, q_tail.clamp(min=tiny))
    overlap = torch.minimum(target.probs, q_top).sum(1) + torch.minimum(target.tail, q_tail)
    scale = row_weight * target.inverse_temperature
    z.mul_((scale * (1 / e_all - target.tail / e_tail.clamp(min=tiny)))[:, None])
    z.scatter_add_(1, ids, (q_top - target.probs).masked_fill_(~valid, 0) * scale[:, None])
    return kl, top[:, 0] + e_all.log(), overlap
