"""The head's Triton kernels against the naive twin: values and every gradient, and the divergences on top of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from livedraft.kernels.buckets import log_buckets_reference
from livedraft.kernels.buckets_triton import log_buckets
from livedraft.kernels.divergence import DIVERGENCES
from torch import Tensor

Head = Callable[..., tuple[Tensor, Tensor]]


def problem(device: str, n: int, vocab: int, units: int, m: int, *, missing: bool = False) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n + vocab)
    hidden, weight = torch.randn(n, units, generator=g), torch.randn(vocab, units, generator=g) * 0.4
    ids = torch.stack([torch.randperm(vocab, generator=g)[:m] for _ in range(n)])
    if missing:
        ids[0], ids[-1, -1] = -1, -1
    return tuple(t.to(device) for t in (hidden, weight, ids, torch.rand(n, generator=g) + 0.5))


def learned(function: Head, parts: tuple[Tensor, ...], loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    hidden, weight = (t.clone().requires_grad_() for t in parts[:2])
    log_q, normaliser = function(hidden, weight, *parts[2:])
    torch.autograd.backward(loss(log_q))
    assert hidden.grad is not None
    assert weight.grad is not None
    return [log_q.detach(), normaliser, hidden.grad, weight.grad]


@pytest.mark.parametrize(
    ("n", "vocab", "units", "m"), [(1, 3, 2, 1), (5, 70, 8, 4), (33, 130, 40, 3), (32, 64, 32, 64), (40, 65, 33, 1)]
)
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_reference(device: str, n: int, vocab: int, units: int, m: int, missing: bool) -> None:
    parts = problem(device, n, vocab, units, m, missing=missing)
    by = torch.randn(n, m + 1, generator=torch.Generator().manual_seed(2)).to(device)
    results = [
        learned(f, parts, lambda log_q: (log_q * by).masked_fill(log_q < -80, 0).sum())
        for f in (log_buckets_reference, log_buckets)
    ]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_divergences_with_a_tail_learn_the_same(device: str, name: str, temperature: float) -> None:
    hidden, weight, _, inverse = problem(device, 20, 90, 16, 5)
    inverse = torch.full_like(inverse, 1 / temperature)
    other = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9)).to(device)
    probs, ids = (other @ weight.T / temperature).softmax(1).topk(5, 1)
    p = torch.cat([probs, 1 - probs.sum(1, keepdim=True)], 1)
    results = [
        learned(f, (hidden, weight, ids, inverse), lambda log_q: DIVERGENCES[name](p, log_q).sum())
        for f in (log_buckets_reference, log_buckets)
    ]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


def test_low_precision_points_the_same_way(device: str) -> None:
    """The interpreter multiplies in float32 all the same: only a GPU tells."""
    parts = problem(device, 24, 100, 32, 4)
    results = [
        learned(f, parts, lambda log_q: log_q.square().sum())
        for f in (log_buckets_reference, lambda h, w, ids, inverse: log_buckets(h, w, ids, inverse, True))
    ]
    for expected, actual in zip(*(r[2:] for r in results), strict=True):
        assert torch.cosine_similarity(expected.flatten(), actual.flatten(), dim=0) > 0.999


def test_only_what_asks_for_a_gradient_gets_one(device: str) -> None:
    hidden, weight, ids, inverse = problem(device, 6, 20, 8, 2)
    hidden.requires_grad_()
    torch.autograd.backward(log_buckets(hidden, weight, ids, inverse)[0].sum())
    assert hidden.grad is not None
    assert weight.grad is None
