"""The chunked head against its naive twin, in value and in every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from livedraft.kernels.buckets import graded_buckets, log_buckets, log_buckets_reference
from torch import Tensor


def problem(n: int, vocab: int, m: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """hidden, weight, ids, inverse temperatures."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 8, generator=g, dtype=dtype)
    weight = torch.randn(vocab, 8, generator=g, dtype=dtype)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:m] for _ in range(n)])
    return hidden, weight, ids, torch.rand(n, generator=g, dtype=dtype) + 0.5


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, ids: Tensor, inverse: Tensor
) -> tuple[Tensor | None, ...]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_q, normaliser = function(h, w, ids, inverse)
    by = torch.randn(log_q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(log_q.dtype)
    # A bucket that holds nothing is a constant.
    torch.autograd.backward((log_q * by).masked_fill(log_q < -80, 0).sum())
    return log_q.detach(), normaliser, h.grad, w.grad


@pytest.mark.parametrize("n", [1, 7, 12])
@pytest.mark.parametrize("m", [1, 4, 30])
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_reference_in_value_and_gradient(n: int, m: int, missing: bool) -> None:
    hidden, weight, ids, inverse = problem(n, 30, m, n)
    if missing:
        ids[0, -1], ids[-1, 0] = -1, -1
    expected = gradients(log_buckets_reference, hidden, weight, ids, inverse)
    actual = gradients(lambda *a: log_buckets(*a, chunk=5), hidden, weight, ids, inverse)
    for left, right in zip(expected, actual, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-10)


def test_a_row_that_names_nothing_is_all_rest() -> None:
    hidden, weight, ids, inverse = problem(3, 30, 4, 0)
    ids[1] = -1
    log_q, _ = log_buckets(hidden, weight, ids, inverse)
    assert log_q[1, -1] == pytest.approx(0, abs=1e-12)
    assert (log_q[1, :-1] < -80).all()


def test_graded_is_the_weighted_rule_of_the_buckets() -> None:
    hidden, weight, ids, inverse = problem(13, 30, 4, 2)
    row_weight = torch.rand(13, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    shift = torch.arange(13, dtype=torch.float64)

    def rule(rows: slice, log_q: Tensor) -> Tensor:
        return (log_q.exp() * log_q).sum(1) * shift[rows] + log_q[:, 0] ** 2

    results = []
    for graded in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if graded:
            found = graded_buckets(h, w, ids, inverse, row_weight, rule, chunk=5)
            total, log_q = found.total, found.log_q
        else:
            log_q, _ = log_buckets_reference(h, w, ids, inverse)
            total = (row_weight * rule(slice(None), log_q)).sum()
        torch.autograd.backward(3 * total)
        results.append((total.detach(), log_q.detach(), h.grad, w.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_far_logits_keep_their_differences() -> None:
    """A named token 200 nats below the best has its log-probability, not that of the smallest float."""
    weight = torch.tensor([[0.0], [-200.0], [-60.0]], dtype=torch.float64)
    log_q, _ = log_buckets(torch.ones(1, 1).double(), weight, torch.tensor([[0, 1]]), torch.ones(1).double())
    assert log_q[0].tolist() == pytest.approx([0.0, -200.0, -60.0])


def test_float32_is_close_to_float64() -> None:
    exact = gradients(log_buckets, *problem(40, 200, 8, 3))
    single = gradients(log_buckets, *(t.float() if t.is_floating_point() else t for t in problem(40, 200, 8, 3)))
    for expected, actual in zip(exact, single, strict=True):
        assert expected is not None
        assert actual is not None
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=5e-4)


def test_low_precision_points_the_same_way() -> None:
    parts = problem(64, 300, 8, 4, torch.float32)
    full = gradients(log_buckets, *parts)
    low = gradients(lambda *a: log_buckets(*a, low_precision=True), *parts)
    for expected, actual in zip(full[2:], low[2:], strict=True):
        assert expected is not None
        assert actual is not None
        assert torch.cosine_similarity(expected.flatten(), actual.flatten(), dim=0) > 0.99
