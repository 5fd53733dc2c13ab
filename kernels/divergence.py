"""How far a drafter's distribution q is from the target's p: one function per formula, on buckets.

A row of p is K named tokens and a tail, B = K + 1 buckets that sum to 1; a row of ``log_q`` are the logarithms of q
on the same buckets (``kernels.buckets``).  Every function takes f[N, B] twice and returns f[N] in nats; p is constant,
``log_q`` may carry a gradient.  All are zero where the bucketed distributions agree.

Merging tokens into a bucket can only lower an f-divergence (data processing inequality), so each is a lower bound of
its full-vocabulary form, which it reaches as K grows to V; what differs inside the tail teaches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]

#: Least probability of a bucket that ``reverse_kl`` sees in the target.
_FLOOR = 1e-6
#: Of the acceptance, before its logarithm.
_LEAST_ACCEPTANCE = 1e-6
#: eta of ``lk_hybrid``.
_LK_DECAY = 3.0


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

    def __getitem__(self, rows: slice | Tensor) -> TopK:
        return TopK(self.ids[rows], self.probs[rows], self.tail[rows], self.inverse_temperature[rows])

    @property
    def buckets(self) -> Tensor:
        """f[N, K + 1]"""
        return torch.cat([self.probs, self.tail[:, None]], 1)


def forward_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_b p (log p - log q): mass-covering.

    Hinton et al. 2015 (arXiv 1503.02531); for drafters DistillSpec (arXiv 2310.08461).  Its gradient by a logit,
    q - p, is bounded whatever q is.  Bounds the acceptance by Pinsker: TV <= sqrt(KL / 2).
    """
    return (torch.xlogy(p, p) - p * log_q).sum(1)


def reverse_kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = sum_b q (log q - log p): mode-seeking.

    DistillSpec (arXiv 2310.08461, section 3), MiniLLM (arXiv 2306.08543).  Needs the tail's bucket: over the named
    tokens alone q's mass elsewhere would cost nothing.  Infinite where q has mass and p has none, so p is taken as
    at least 1e-6 per bucket, which can make a value negative by at most 1e-6 B.
    """
    return (log_q.exp() * (log_q - p.clamp(min=_FLOOR).log())).sum(1)


def acceptance(p: Tensor, log_q: Tensor) -> Tensor:
    """alpha = sum_b min(p, q), in [0, 1]: the chance that a proposal drawn from q is accepted.

    Leviathan et al. 2023 (arXiv 2211.17192, corollary 3.6).  Not itself a divergence: 1 - alpha is.
    """
    return torch.minimum(p, log_q.exp()).sum(1)


def total_variation(p: Tensor, log_q: Tensor) -> Tensor:
    """1 - alpha, in [0, 1]: what is lost at a position, directly.

    DistillSpec's TVD (arXiv 2310.08461, section 3).  Its gradient is in size at most q on either side, so where q is
    far from p, as at a fresh drafter's beginning, it hardly teaches.
    """
    return 1 - acceptance(p, log_q)


def lk_log(p: Tensor, log_q: Tensor) -> Tensor:
    """-log alpha.

    LK losses (Samarin et al. 2026, arXiv 2602.23881): the total variation's direction, 1 / alpha times as long, so that
    it does not vanish where q is far from p.  Here alpha is at least 1e-6, and below that nothing is taught.
    """
    return -acceptance(p, log_q).clamp(min=_LEAST_ACCEPTANCE).log()


def lk_hybrid(p: Tensor, log_q: Tensor) -> Tensor:
    """lambda KL(p || q) + (1 - lambda) TV, with lambda = exp(-3 alpha) held constant.

    LK losses (Samarin et al. 2026, arXiv 2602.23881): KL leads while alpha is small, TV once it is not.  Here lambda
    is each row's own; SpecForge's implementation takes it from the mean alpha of a step's rows.
    """
    alpha = acceptance(p, log_q)
    trust = (-_LK_DECAY * alpha.detach()).exp()
    return trust * forward_kl(p, log_q) + (1 - trust) * (1 - alpha)


#: By their names in the settings.
DIVERGENCES: Mapping[str, Divergence] = {
    f.__name__: f for f in (forward_kl, reverse_kl, total_variation, lk_log, lk_hybrid)
}
