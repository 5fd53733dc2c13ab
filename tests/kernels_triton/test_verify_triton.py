"""Batched verification decides as its twin does on the same random numbers, and leaves the target as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from livedraft.kernels.verify import verify_chains_reference, verify_trees_reference
from livedraft.kernels.verify_triton import verify_chains, verify_trees
from scipy.stats import chisquare
from torch import Tensor


def rows(g: torch.Generator, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=g) * 2).softmax(-1)


@pytest.mark.parametrize("vocab", [3, 300])
@pytest.mark.parametrize("seed", range(4))
def test_chains_decide_as_their_twin(device: str, vocab: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    batch, n = 12, 4
    p, q = rows(g, batch, n + 1, vocab), rows(g, batch, n, vocab)
    q[::3] = p[::3, :n]  # some agree, and stand to the end
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=g).view(batch, n)
    lengths = torch.randint(0, n + 1, (batch,), generator=g)
    uniforms = torch.rand(batch, n + 1, generator=g, dtype=torch.float64)
    uniforms[0] = 0
    expected = verify_chains_reference(p, q, tokens, lengths, uniforms)
    found = verify_chains(*(t.to(device) for t in (p, q, tokens, lengths, uniforms)))
    for want, have in zip(expected, found, strict=True):
        assert have.tolist() == want.tolist()
    assert len(set(expected[0].tolist())) > 1


@pytest.mark.parametrize("vocab", [5, 300])
@pytest.mark.parametrize("seed", range(4))
def test_trees_decide_as_their_twin(device: str, vocab: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    batch, n = 12, 7
    p = rows(g, batch, n + 1, vocab) ** 3
    p = p / p.sum(-1, keepdim=True)
    parents = torch.stack([(torch.rand(batch, generator=g) * (i + 1)).long() - 1 for i in range(n)], 1)
    # Siblings hold the likeliest tokens, so that walks get far.
    tokens = torch.zeros(batch, n, dtype=torch.int64)
    for b in range(batch):
        for i in range(n):
            elder = int((parents[b, :i] == parents[b, i]).sum())
            tokens[b, i] = p[b, parents[b, i] + 1].argsort(descending=True)[min(elder, vocab - 1)]
    lengths = torch.randint(0, n + 1, (batch,), generator=g)
    uniforms = torch.rand(batch, n + 1, generator=g, dtype=torch.float64)
    expected = verify_trees_reference(p, tokens, parents, lengths, uniforms)
    found = verify_trees(*(t.to(device) for t in (p, tokens, parents, lengths, uniforms)))
    for want, have in zip(expected, found, strict=True):
        assert have.tolist() == want.tolist()
    assert int(expected[1].max()) > 1


def test_a_batch_of_chains_is_distributed_as_the_target(device: str) -> None:
    g = torch.Generator().manual_seed(5)
    batch, vocab = 500, 5
    p0, q0 = rows(g, 2, vocab)
    tokens = torch.multinomial(q0, batch, replacement=True, generator=g)[:, None]
    p = torch.stack([p0, rows(g, vocab)]).expand(batch, 2, vocab)
    uniforms = torch.rand(batch, 2, generator=g, dtype=torch.float64)
    parts = (p, q0.expand(batch, 1, vocab), tokens, torch.ones(batch, dtype=torch.int64), uniforms)
    accepted, bonus = (t.cpu() for t in verify_chains(*(t.to(device) for t in parts)))
    first = torch.where(accepted > 0, tokens[:, 0], bonus)
    expected = (p0.double() / p0.double().sum() * batch).numpy()
    assert chisquare(np.bincount(first, minlength=vocab), expected).pvalue > 1e-4
    assert chisquare(np.bincount(tokens[:, 0], minlength=vocab), expected).pvalue < 1e-4  # the statistic can tell
