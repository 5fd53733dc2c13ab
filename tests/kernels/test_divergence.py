"""Every divergence: what makes it one, and its gradient against the naive full-vocabulary form."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from livedraft.kernels.buckets import graded_buckets
from livedraft.kernels.divergence import DIVERGENCES, TopK, acceptance, forward_kl, lk_hybrid, lk_log, total_variation
from torch import Tensor

VOCAB = 12
NAMES = sorted(DIVERGENCES)
seeds = st.integers(0, 100_000)


def distributions(seed: int, rows: int = 5, vocab: int = VOCAB, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    """p and log q, dense, in float64."""
    z = torch.randn(2, rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharpness
    return z[0].softmax(1), z[1].log_softmax(1)


def bucketed(p: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both with the k likeliest of p named and the rest in one bucket."""
    order = p.argsort(1, descending=True)
    p, log_q = p.gather(1, order), log_q.gather(1, order)
    if k == p.shape[1]:
        return torch.nn.functional.pad(p, (0, 1)), torch.nn.functional.pad(log_q, (0, 1), value=-700.0)
    return (
        torch.cat([p[:, :k], p[:, k:].sum(1, keepdim=True)], 1),
        torch.cat([log_q[:, :k], log_q[:, k:].logsumexp(1, keepdim=True)], 1),
    )


def naive(name: str, p: Tensor, log_q: Tensor) -> Tensor:
    """Each formula as its paper writes it, over the whole vocabulary."""
    q = log_q.exp()
    alpha = torch.min(p, q).sum(1)
    kl = (p * (p.log() - log_q)).sum(1)
    if name == "lk_hybrid":
        trust = torch.exp(-3 * alpha).detach()
        return trust * kl + (1 - trust) * 0.5 * (p - q).abs().sum(1)
    return {
        "forward_kl": kl,
        "reverse_kl": (q * (log_q - p.log())).sum(1),
        "total_variation": 0.5 * (p - q).abs().sum(1),
        "lk_log": -alpha.log(),
    }[name]


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds)
def test_zero_where_the_drafter_is_the_target_and_above_it_elsewhere(name: str, seed: int) -> None:
    p, log_q = distributions(seed)
    for k in (1, 4, VOCAB):
        some_p, some_log_q = bucketed(p, log_q, k)
        assert (DIVERGENCES[name](some_p, some_log_q) > -1e-5).all()
        same = DIVERGENCES[name](*bucketed(p, p.log(), k))
        torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-5, rtol=0)


@given(seed=seeds)
def test_bounds(seed: int) -> None:
    p, log_q = bucketed(*distributions(seed, sharpness=4.0), 4)
    alpha, tv = acceptance(p, log_q), total_variation(p, log_q)
    assert ((alpha >= 0) & (alpha <= 1 + 1e-12)).all()
    torch.testing.assert_close(tv, 0.5 * (p - log_q.exp()).abs().sum(1))
    assert (tv <= (forward_kl(p, log_q) / 2).sqrt() + 1e-9).all()  # Pinsker
    assert (lk_log(p, log_q) >= tv - 1e-12).all()
    assert (lk_hybrid(p, log_q) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds)
def test_the_order_of_the_vocabulary_is_nothing_to_it(name: str, seed: int) -> None:
    p, log_q = distributions(seed)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed + 1))
    for k in (3, VOCAB):
        before, after = (DIVERGENCES[name](*bucketed(*x, k)) for x in ((p, log_q), (p[:, order], log_q[:, order])))
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "total_variation", "lk_log"])
@given(seed=seeds)
def test_more_buckets_tell_more_and_all_of_them_everything(name: str, seed: int) -> None:
    p, log_q = distributions(seed)
    p = 0.99 * p + 0.01 / VOCAB  # above reverse KL's floor
    values = [DIVERGENCES[name](*bucketed(p, log_q, k)) for k in range(1, VOCAB + 1)]
    for coarse, fine in itertools.pairwise(values):
        assert (coarse <= fine + 1e-9).all()
    torch.testing.assert_close(values[-1], naive(name, p, log_q))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_gradients_are_those_of_the_naive_form_over_the_vocabulary(name: str, temperature: float) -> None:
    """Through the head, with every token named: float64 autograd of all logits at the request's temperature."""
    g = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (9, VOCAB))
    p = (torch.randn(9, VOCAB, generator=g, dtype=torch.float64) / temperature).softmax(1)
    p = 0.999 * p + 0.001 / VOCAB  # above reverse KL's floor
    probs, ids = p.sort(1, descending=True)
    inverse = torch.full((9,), 1 / temperature, dtype=torch.float64)
    share = torch.rand(9, generator=g, dtype=torch.float64)
    target = TopK(ids, probs, torch.zeros(9).double(), inverse)
    gradients = []
    for dense in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if dense:
            total = (share * naive(name, p, (h @ w.T / temperature).log_softmax(1))).sum()
        else:
            total = graded_buckets(
                h, w, ids, inverse, share, lambda rows, log_q: DIVERGENCES[name](target.buckets[rows], log_q), chunk=4
            ).total
        torch.autograd.backward(total)
        gradients.append((total.detach(), h.grad, w.grad))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 5])
def test_gradients_with_a_tail_are_those_of_the_merged_vocabulary(name: str, k: int) -> None:
    p, log_q = distributions(11)
    z = log_q.clone().requires_grad_()
    torch.autograd.backward(DIVERGENCES[name](*bucketed(p, z.log_softmax(1), k)).sum())
    merged_p = bucketed(p, log_q, k)[0]
    z_naive = log_q.clone().requires_grad_()
    torch.autograd.backward(naive(name, merged_p, bucketed(p, z_naive.log_softmax(1), k)[1]).sum())
    torch.testing.assert_close(z.grad, z_naive.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_hard_target_and_a_sure_drafter_stay_finite(name: str) -> None:
    p = torch.tensor([[1.0, 0.0, 0.0]]).double()
    z = torch.tensor([[-400.0, 400.0, 0.0]]).double().requires_grad_()
    value = DIVERGENCES[name](p, z.log_softmax(1)).sum()
    torch.autograd.backward(value)
    assert value.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()
