"""Verification leaves the target's distribution exactly as it is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from livedraft.kernels.sampling import distribution, draw, draw_rows
from livedraft.kernels.verify import verify_chain, verify_greedy, verify_tree
from scipy.stats import chisquare
from torch import Tensor

DRAWS = 20_000


def random_rows(rows: int, vocabulary: int, seed: int, sharpness: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator) * sharpness).softmax(-1)


def assert_follows(counts: Mapping[tuple[int, ...], int], expected: Mapping[Any, float]) -> None:
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    likely = {k: p for k, p in expected.items() if p * total >= 5}
    rest = 1 - sum(likely.values())
    observed = [counts.get(k, 0) for k in likely]
    observed.append(total - sum(observed))
    wanted = [p * total for p in likely.values()] + [max(rest, 1e-12) * total]
    assert chisquare(np.array(observed), np.array(wanted) / sum(wanted) * total).pvalue > 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_a_sampled_chain_leaves_one_and_two_token_distributions_alone(seed: int) -> None:
    vocabulary, rng = 6, random.Random(seed)
    after: dict[int, Tensor] = {t: random_rows(1, vocabulary, 100 + seed * 10 + t)[0] for t in range(vocabulary)}
    p0, q0 = random_rows(2, vocabulary, seed)
    q_after = {t: random_rows(1, vocabulary, 500 + seed * 10 + t)[0] for t in range(vocabulary)}
    first: Counter[tuple[int, ...]] = Counter()
    pairs: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        x = draw(q0, rng.random())
        y = draw(q_after[x], rng.random())
        # The target's row after the second draft token decides only what follows the pair.
        p = torch.stack([p0, after[x], after[y]])
        count, bonus = verify_chain(p, torch.stack([q0, q_after[x]]), [x, y], rng.random)
        out = [*[x, y][:count], bonus]
        if len(out) == 1:
            out.append(draw(after[out[0]], rng.random()))
        first[(out[0],)] += 1
        pairs[(out[0], out[1])] += 1
    assert_follows(first, {(t,): float(p0[t]) for t in range(vocabulary)})
    assert_follows(pairs, {(s, t): float(p0[s] * after[s][t]) for s in range(vocabulary) for t in range(vocabulary)})


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_leaves_one_and_two_token_distributions_alone(seed: int) -> None:
    vocabulary, rng = 6, random.Random(seed)
    rows = random_rows(7, vocabulary, seed)
    tokens, parents = [0, 1, 2, 0, 3, 5], [-1, -1, -1, 0, 0, 1]
    node_rows = {node: rows[node + 1] for node in range(6)}
    after = {tokens[n]: node_rows[n] for n in range(3)}
    elsewhere = random_rows(1, vocabulary, 77)[0]
    pairs: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        path, bonus = verify_tree(rows, tokens, parents, rng.random)
        out = [*(tokens[n] for n in path), bonus]
        if len(out) == 1:
            out.append(draw(after.get(out[0], elsewhere), rng.random()))
        pairs[(out[0], out[1])] += 1
    expected = {
        (s, t): float(rows[0][s] * after.get(s, elsewhere)[t]) for s in range(vocabulary) for t in range(vocabulary)
    }
    assert_follows(pairs, expected)


def test_the_statistic_notices_a_verifier_that_keeps_every_draft() -> None:
    rng = random.Random(0)
    p0, q0 = random_rows(2, 6, 0)
    counts: Counter[tuple[int, ...]] = Counter((draw(q0, rng.random()),) for _ in range(DRAWS))
    with pytest.raises(AssertionError):
        assert_follows(counts, {(t,): float(p0[t]) for t in range(6)})


def test_a_token_of_no_target_mass_never_stands() -> None:
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert verify_chain(p, torch.tensor([[1.0, 0.0]]), [0], lambda: 0.0) == (0, 1)


def test_equal_distributions_always_stand() -> None:
    p = random_rows(3, 5, 0)
    for seed in range(50):
        rng = random.Random(seed)
        assert verify_chain(p, p[:2], [1, 2], rng.random)[0] == 2


def test_greedy_follows_the_best_child() -> None:
    #        root: 7, node 0: 8, node 1 (token 9): 4
    assert verify_greedy([7, 8, 4, 0], [7, 9, 8], [-1, -1, 0]) == ([0, 2], 0)
    assert verify_greedy([5, 0, 0], [7, 9], [-1, -1]) == ([], 5)
    assert verify_greedy([3], [], []) == ([], 3)


@given(
    st.integers(0, 10_000),
    st.floats(0.1, 3.0),
    st.integers(0, 12),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_distribution_is_what_transformers_samples_from(seed: int, temperature: float, k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if k > 0:
        scores = TopKLogitsWarper(min(k, 10))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    ours = distribution(logits, temperature, k, top_p)
    torch.testing.assert_close(ours, scores.softmax(-1), atol=1e-6, rtol=1e-5)


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_sum(seed: int, uniform: float) -> None:
    weights = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    weights[seed % 9] = 0
    index = draw(weights, uniform)
    assert weights[index] > 0
    cumulative = weights.double().cumsum(-1)
    assert (cumulative[index - 1] if index else 0.0) <= uniform * cumulative[-1] + 1e-12
    assert uniform * cumulative[-1] <= cumulative[index] + 1e-12
    assert draw_rows(weights[None], torch.tensor([uniform], dtype=torch.float64)).item() == index
