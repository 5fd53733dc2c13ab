"""What the drafter is taught: agree with the target at every step it will draft, on its own outputs.

    L = sum_k decay^k ( mean_accept KL_k  +  lambda / n_accept * sum_discard w KL_k )

Accept term: committed positions.  Their text is target-distributed whatever drafter proposed it, so it needs no
importance weights.  Discard term: rejected nodes, the target conditioned on the rejected prefix (Aurora,
arXiv 2602.06932, calls it discard sampling).  Which prefixes were tried does depend on the drafter of the day, so
a node weighs prod_{i<=k} min(1, q_now(x_i) / q_then(x_i)) over the proposals on its line, held constant; proposals
that were not drawn by chance weigh 1.

Left out: reverse KL and acceptance-direct losses (LK losses, arXiv 2602.23881), policy gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from livedraft.kernels.divergence import sparse_forward_kl
from livedraft.trainer.batch import Batch
from livedraft.trainer.model import Drafter
from livedraft.trainer.unroll import unroll
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """``unroll`` steps, weighted ``decay ** k``; ``discard`` is lambda, 0 leaves rejected nodes out."""

    unroll: int = 5
    decay: float = 0.8
    discard: float = 0.0
    low_precision: bool = False


@dataclass(frozen=True)
class Loss:
    """``total`` is what is minimised; the rest are measurements."""

    total: Tensor
    #: f[D] mean KL in nats, and mean sum of min(p, q), on committed positions at each step.
    divergence: Tensor
    overlap: Tensor
    #: f[n] the accept length of each lesson alone.
    by_lesson: Tensor

    @property
    def accept_length(self) -> float:
        """1 + sum_k prod_{i<=k} overlap_i: what these overlaps would give, bonus token included."""
        return 1 + float(self.overlap.cumprod(0).sum())


def loss(drafter: Drafter, batch: Batch, objective: Objective) -> Loss:
    """The objective on one batch, its unroll no deeper than the batch's chains."""
    total = drafter.norm.weight.sum() * 0
    depth = min(objective.unroll, len(batch.steps))
    divergence, overlap = torch.zeros(2, depth)
    lessons = torch.tensor(batch.roots.chains)
    owner = torch.arange(len(lessons)).repeat_interleave(lessons)
    agreed, counted = torch.zeros(2, depth, len(lessons))
    # log of the importance weight that each chain's line has gathered so far
    line = batch.proposed.new_zeros(len(batch.proposed))
    for k, hidden in enumerate(unroll(drafter, batch.roots, depth)):
        step = batch.steps[k]
        if not len(step.chains):
            continue
        normed = drafter.norm(hidden)
        committed = ~step.rejected
        count = max(int(committed.sum()), 1)
        weight = torch.where(step.rejected, objective.discard * line[step.chains].exp(), 1.0) / count
        found = sparse_forward_kl(
            normed[step.chains],
            drafter.lm_head.weight,
            step.target,
            weight,
            low_precision=objective.low_precision,
        )
        total = total + objective.decay**k * found.total
        divergence[k] = found.rows[committed].sum() / count
        overlap[k] = found.overlap[committed].sum() / count
        agreed[k].index_add_(0, owner[step.chains], (found.overlap * committed).float())
        counted[k].index_add_(0, owner[step.chains], committed.float())
        if objective.discard and k + 1 < depth:
            line = line + _log_ratio(drafter, normed.detach(), batch, k + 1)
    by_lesson = 1 + (agreed / counted.clamp(min=1)).cumprod(0).sum(0)
    return Loss(total, divergence, overlap, by_lesson)


@torch.no_grad()
def _log_ratio(drafter: Drafter, normed: Tensor, batch: Batch, step: int) -> Tensor:
    """f[C] min(0, log q_now - log q_then) of the proposal read at ``step``; 0 where it was not drawn by chance."""
    ratio = torch.zeros_like(batch.inverse_temperature)
    drawn = torch.nonzero(batch.proposed[:, step])[:, 0]
    logits = drafter.lm_head(normed[drawn]) * batch.inverse_temperature[drawn, None]
    row = drafter.draft_row[batch.roots.tokens[drawn, step]]
    now = logits.log_softmax(1).gather(1, row[:, None])[:, 0]
    ratio[drawn] = (now - batch.proposed[drawn, step]).clamp(max=0)
    return ratio
