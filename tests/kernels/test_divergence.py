"""The chunked divergence against its naive twin, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from livedraft.kernels.divergence import TopK, sparse_forward_kl, sparse_forward_kl_reference


def rows(n: int, vocab: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 8, generator=g, dtype=dtype)
    weight = torch.randn(vocab, 8, generator=g, dtype=dtype)
    inverse_temperature = torch.rand(n, generator=g, dtype=dtype) + 0.5
    p = (torch.randn(n, vocab, generator=g, dtype=dtype) * 2).softmax(1)
    probs, ids = p.topk(k, 1)
    row_weight = torch.rand(n, generator=g, dtype=dtype)
    return hidden, weight, ids, probs, inverse_temperature, row_weight


def sparse(ids: torch.Tensor, probs: torch.Tensor, inverse_temperature: torch.Tensor) -> TopK:
    return TopK(ids, probs, 1 - probs.sum(1), inverse_temperature)


@pytest.mark.parametrize("n", [1, 7, 12])
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_reference_in_value_and_gradient(n: int, missing: bool) -> None:
    hidden, weight, ids, probs, inverse_temperature, row_weight = rows(n, 30, 4, n)
    if missing:
        ids, probs = ids.clone(), probs.clone()
        ids[0, 1], ids[-1, 0] = -1, -1
        probs[0, 1], probs[-1, 0] = 0, 0
    target = sparse(ids, probs, inverse_temperature)
    results = []
    for function in (sparse_forward_kl_reference, lambda *a: sparse_forward_kl(*a, chunk=5)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        found = function(h, w, target, row_weight)
        torch.autograd.backward(3 * found.total)
        results.append((found.total.detach(), found.rows, found.log_normaliser, found.overlap, h.grad, w.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_float32_is_close_to_float64() -> None:
    parts = rows(40, 200, 8, 3)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        hidden, weight, ids, probs, inverse_temperature, row_weight = (
            t.to(dtype) if t.is_floating_point() else t for t in parts
        )
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.autograd.backward(sparse_forward_kl(h, w, sparse(ids, probs, inverse_temperature), row_weight).total)
        gradients.append((h.grad, w.grad))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


def test_low_precision_points_the_same_way() -> None:
    hidden, weight, ids, probs, inverse_temperature, row_weight = rows(64, 300, 8, 4, torch.float32)
    target = sparse(ids, probs, inverse_temperature)
    gradients = []
    for low in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.autograd.backward(sparse_forward_kl(h, w, target, row_weight, low_precision=low).total)
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in (h, w) if leaf.grad is not None]))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_is_the_dense_divergence_when_every_id_is_kept() -> None:
    hidden, weight, ids, probs, inverse_temperature, row_weight = rows(6, 9, 9, 5)
    found = sparse_forward_kl(
        hidden, weight, TopK(ids, probs, torch.zeros(6).double(), inverse_temperature), row_weight
    )
    q = (hidden @ weight.T * inverse_temperature[:, None]).log_softmax(1).gather(1, ids)
    torch.testing.assert_close(found.rows, (probs * (probs.log() - q)).sum(1))
    torch.testing.assert_close(found.overlap, torch.minimum(probs, q.exp()).sum(1))


def test_is_zero_with_overlap_one_when_the_drafter_is_the_target() -> None:
    hidden, weight, *_ = rows(5, 20, 4, 6)
    probs, ids = (hidden @ weight.T / 0.7).softmax(1).topk(4, 1)
    found = sparse_forward_kl(
        hidden, weight, sparse(ids, probs, torch.full((5,), 1 / 0.7).double()), torch.ones(5).double()
    )
    torch.testing.assert_close(found.rows, torch.zeros(5).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.overlap, torch.ones(5).double())
