"""What the drafter is taught: agree with the target at every step it will draft, on its own outputs.

    L = sum_k decay^k / n_k ( sum_committed f_k  +  discard sum_rejected w f_k )      n_k committed rows of step k

Where ranks share a batch, n_k and what else is divided by are of the whole batch (``census``), so that the parts of
the loss, its gradient and its measurements add up.

f is a weighted sum of terms.  Those of ``kernels.divergence`` judge any node by the target's distribution there; three
more need committed text and are written below: ``ntp``, ``policy_gradient`` and ``accept_length``.

Committed text is target-distributed whatever drafter proposed it, so divergences on it need no importance weights.
Rejected nodes (Aurora, arXiv 2602.06932, calls theirs discard sampling), where the target was conditioned on the
rejected prefix, do depend on the drafter of the day.  A node therefore weighs

    w = prod_{i<=k} min(c, q_now(x_i) / q_then(x_i))

over the proposals on its line, each ratio truncated (Ionides 2008) and held constant.  The nodes of a tree were not
drawn by chance; they have no such density and weigh 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from livedraft.kernels.buckets import graded_buckets, log_buckets
from livedraft.kernels.divergence import DIVERGENCES, acceptance, forward_kl
from livedraft.trainer.batch import Batch, Supervision
from livedraft.trainer.model import Drafter
from livedraft.trainer.unroll import unroll
from torch import Tensor

#: epsilon of ``policy_gradient``.
_CLIP = 0.2


@dataclass(frozen=True)
class Objective:
    """``unroll`` steps, weighted ``decay ** k``; ``discard`` 0 leaves rejected nodes out; ``terms`` by name."""

    unroll: int = 5
    decay: float = 0.8
    discard: float = 0.0
    terms: Mapping[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})
    #: c above.
    importance_cap: float = 1.0
    low_precision: bool = False


@dataclass(frozen=True)
class Loss:
    """``total`` is what is minimised; the rest are measurements, whatever the objective."""

    total: Tensor
    #: f[D] mean KL(target || drafter) in nats, and mean acceptance, on committed positions at each step.
    divergence: Tensor
    overlap: Tensor
    #: f[n] the accept length of each lesson alone.
    by_lesson: Tensor

    @property
    def accept_length(self) -> float:
        """1 + sum_k prod_{i<=k} overlap_i: what these overlaps would give, bonus token included."""
        return 1 + float(self.overlap.cumprod(0).sum())


def ntp(log_following: Tensor) -> Tensor:
    """-log q(x) of the committed token x that came next: cross-entropy with a hard label.  f[n] -> f[n].

    EAGLE's classification loss, and Aurora's NTP.  An unbiased but noisier estimate of forward KL's gradient, for
    text drawn from the target; on greedy text it aims at the argmax alone.  It needs no recorded distribution.
    """
    return -log_following


def policy_gradient(log_now: Tensor, log_then: Tensor, advantage: Tensor, clip: float = _CLIP) -> Tensor:
    """-min(r A, clip(r, 1 - clip, 1 + clip) A), r = q_now(a) / q_then(a) of a proposal a.  f[n] three times -> f[n].

    PPO's surrogate (Schulman et al. 2017, arXiv 1707.06347, equation 7).  Where nothing is clipped and r is 1 its
    gradient is REINFORCE's.  It knows only of what was tried, so it is noisier than the terms that see p and q whole.
    """
    ratio = (log_now - log_then).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def accept_length(alpha: Tensor) -> Tensor:
    """sum_k (1 - prod_{i<=k} alpha_i): draft tokens lost of a chain, differentiated exactly.  f[C, D] -> f[C].

    D + 1 less the expected accept length 1 + sum_k prod_{i<=k} alpha_i (Leviathan et al. 2023, arXiv 2211.17192,
    section 3.1, with an alpha per step).  No sampling, hence no REINFORCE.  Between 0 and D.  Of a step without a
    recorded distribution alpha is NaN, and a chain ends there.  Limit: alphas are taken along committed text, which
    weighs prefixes by the target's probability; those that a drafter gets through are weighed by min(p, q).
    """
    known = alpha.isnan().cumsum(1) == 0
    return (known * (1 - alpha.nan_to_num(1.0).cumprod(1))).sum(1)


def census(batch: Batch) -> Tensor:
    """f64[D, 3] at each step: committed rows, proposals drawn by chance, tokens accepted from those on.  Adds up."""
    found = torch.zeros(len(batch.steps), 3, dtype=torch.float64)
    for counted, step in zip(found, batch.steps, strict=True):
        acting = step.proposal >= 0
        counted[0], counted[1], counted[2] = (~step.rejected).sum(), acting.sum(), step.accepted[acting].sum()
    return found


def loss(drafter: Drafter, batch: Batch, objective: Objective, whole: Tensor | None = None) -> Loss:
    """The objective on one batch, its unroll no deeper than the batch's chains.

    ``whole`` is the ``census`` of the batch that this one is a part of, if it is.
    """
    whole = census(batch) if whole is None else whole
    total = drafter.norm.weight.sum() * 0
    depth = min(objective.unroll, len(batch.steps))
    divergence, overlap = torch.zeros(2, depth)
    chains = torch.tensor(batch.forest.levels[0].counts)
    owner = torch.arange(len(chains)).repeat_interleave(chains)
    agreed, counted = torch.zeros(2, depth, len(chains))
    lines = _Lines(drafter, batch, objective.importance_cap) if objective.discard else None
    alphas: list[Tensor] = []
    for k, hidden in enumerate(unroll(drafter, batch.forest, depth)):
        step = batch.steps[k]
        normed = drafter.norm(hidden)
        committed = ~step.rejected
        count = max(int(whole[k, 0]), 1)
        weight = committed.to(hidden.dtype) / count
        if lines:
            weight = weight + step.rejected * (objective.discard / count) * lines.weights(k)[step.rows]
        found = _judge(drafter, normed, step, weight, objective, whole[k])
        total = total + objective.decay**k * found.total
        divergence[k] = forward_kl(found.p, found.log_q.detach())[committed].sum() / count
        alpha = acceptance(found.p, found.log_q)[committed]
        overlap[k] = alpha.detach().sum() / count
        of = owner[step.chain[committed]]
        agreed[k].index_add_(0, of, alpha.detach().float())
        counted[k].index_add_(0, of, torch.ones_like(of, dtype=torch.float32))
        if "accept_length" in objective.terms:
            of_chain = alpha.new_full((len(batch.forest.root),), math.nan)
            alphas.append(of_chain.index_put((step.chain[committed],), alpha))
        if lines:
            lines.remember(normed.detach(), step, found.log_normaliser)
    if alphas:
        known = max(int(whole[0, 0]), 1)
        total = total + objective.terms["accept_length"] * accept_length(torch.stack(alphas, 1)).sum() / known
    by_lesson = 1 + (agreed / counted.clamp(min=1)).cumprod(0).sum(0)
    return Loss(total, divergence, overlap, by_lesson)


@dataclass(frozen=True)
class _Judged:
    total: Tensor
    #: f[n, K + 1] target and drafter on the target's buckets.
    p: Tensor
    log_q: Tensor
    #: f[n]
    log_normaliser: Tensor


def _judge(
    drafter: Drafter, normed: Tensor, step: Supervision, weight: Tensor, objective: Objective, whole: Tensor
) -> _Judged:
    """The terms that are sums over rows, on one level, where a divergence weighs f[n] ``weight``."""
    target, terms = step.target, objective.terms
    p, named = target.buckets, target.ids.shape[1]
    divergences = [(DIVERGENCES[name], share) for name, share in terms.items() if name in DIVERGENCES]
    # Tokens that a term asks for get buckets of their own, beside the target's.
    ids, following = _name(target.ids, step.following) if "ntp" in terms else (target.ids, None)
    ids, proposal = _name(ids, step.proposal) if "policy_gradient" in terms else (ids, None)
    known = terms.get("ntp", 0) * (step.following >= 0)
    acting, advantage = _actions(step, whole)
    acting = terms.get("policy_gradient", 0) * acting

    def rule(rows: slice, log_q: Tensor) -> Tensor:
        on_target = _on_target(log_q, named)
        value = torch.zeros_like(log_q[:, 0])
        for divergence, share in divergences:
            value = value + share * divergence(p[rows], on_target)
        if following is not None:
            value = value + known[rows] * ntp(_of(log_q, following[rows]))
        if proposal is not None:
            log_now = _of(log_q, proposal[rows])
            value = value + acting[rows] * policy_gradient(log_now, step.proposed[rows], advantage[rows])
        return value

    head = normed[step.rows], drafter.lm_head.weight, ids, target.inverse_temperature
    if "accept_length" in terms:  # it ties steps together, so their gradients cannot be formed one by one
        log_q, log_normaliser = log_buckets(*head, low_precision=objective.low_precision)
        return _Judged((weight * rule(slice(None), log_q)).sum(), p, _on_target(log_q, named), log_normaliser)
    found = graded_buckets(*head, weight, rule, low_precision=objective.low_precision)
    return _Judged(found.total, p, _on_target(found.log_q, named), found.log_normaliser)


def _name(ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``ids`` with one more column for ``tokens`` i64[n] that are not among them, and each one's column i64[n]."""
    found = ids == tokens[:, None]
    present = found.any(1)
    column = torch.where(present, found.int().argmax(1), ids.shape[1])
    return torch.cat([ids, tokens.masked_fill(present, -1)[:, None]], 1), column


def _of(log_q: Tensor, column: Tensor) -> Tensor:
    return log_q.gather(1, column[:, None])[:, 0]


def _on_target(log_q: Tensor, named: int) -> Tensor:
    """f[n, K + 1] with the buckets beyond the target's K put back into the tail."""
    if log_q.shape[1] == named + 1:
        return log_q
    return torch.cat([log_q[:, :named], log_q[:, named:].logsumexp(1, keepdim=True)], 1)


def _actions(step: Supervision, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``policy_gradient``: f[n] weight that makes its mean one over proposals, and f[n] advantage.

    The return of a proposal is how many tokens were accepted from it on, the baseline their mean at this depth.
    """
    committed, proposals, returns = whole.tolist()
    acting = (step.proposal >= 0).to(step.accepted.dtype)
    count = max(proposals, 1)
    return acting * committed / count, step.accepted - returns / count


class _Lines:
    """Importance weights along lines of proposals, level by level: ``weights`` of one, then ``remember`` it."""

    def __init__(self, drafter: Drafter, batch: Batch, cap: float) -> None:
        self._drafter, self._batch = drafter, batch
        self._log_cap = math.log(cap)
        self._line = torch.zeros(len(batch.forest.root))

    @torch.no_grad()
    def weights(self, k: int) -> Tensor:
        """f[rows of level k]"""
        if k:
            level = self._batch.forest.levels[k]
            above = torch.arange(len(level.tokens)) if level.parent is None else level.parent
            self._line = self._line[above] + self._log_ratio(k, above)
        return self._line.exp()

    @torch.no_grad()
    def remember(self, normed: Tensor, step: Supervision, log_normaliser: Tensor) -> None:
        """What the next level's proposals were drawn from; where no target judged a row that is not known."""
        self._normed = normed
        self._inverse_temperature = torch.zeros_like(normed[:, 0])
        self._inverse_temperature[step.rows] = step.target.inverse_temperature.to(normed.dtype)
        self._log_normaliser = torch.full_like(normed[:, 0], math.inf)
        self._log_normaliser[step.rows] = log_normaliser

    def _log_ratio(self, k: int, above: Tensor) -> Tensor:
        """min(log c, log q_now - log q_then) of each token read; 0 where it was not drawn by chance."""
        then = self._batch.drawn[k]
        drawn = torch.nonzero(then)[:, 0]
        row = self._drafter.draft_row[self._batch.forest.levels[k].tokens[drawn]]
        parent = above[drawn]
        z = (self._normed[parent] * self._drafter.lm_head.weight[row]).sum(1) * self._inverse_temperature[parent]
        now = (z - self._log_normaliser[parent]).masked_fill(row < 0, -math.inf)
        ratio = self._normed.new_zeros(len(above))
        ratio[drawn] = (now - then[drawn]).clamp(max=self._log_cap).to(ratio.dtype)
        return ratio
