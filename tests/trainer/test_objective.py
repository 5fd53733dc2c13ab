"""The objective: its gradients, its weights, its special cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.messages import Trace
from livedraft.contracts.settings import DIVERGENCES, ON_COMMITTED_TEXT
from livedraft.kernels import divergence as kernels
from livedraft.trainer import objective
from livedraft.trainer.batch import pack
from livedraft.trainer.lesson import Lesson, Rejections, lesson
from livedraft.trainer.model import Drafter
from livedraft.trainer.objective import Objective, census, loss
from livedraft.trainer.unroll import unroll
from torch import Tensor

TraceMaker = Callable[..., Trace]


def exact(about: Lesson) -> Lesson:
    """A lesson in float64, so that a comparison can be tight on any processor."""
    floats = ("features", "top_logprobs", "tail")
    return replace(about, **{name: getattr(about, name).double() for name in floats})


def log_qs(drafter: Drafter, about: Lesson, k: int, hidden: Tensor) -> Tensor:
    """f[n, V] of all rows of level k, all logits at once."""
    log_q: Tensor = (drafter.lm_head(drafter.norm(hidden)) / about.temperature).log_softmax(1)
    return log_q


def on_buckets(about: Lesson, row: int, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Target and drafter f[K + 1] at one node."""
    ids = about.top_ids[row]
    others = torch.ones_like(log_q).bool()
    others[ids] = False
    p = torch.cat([about.top_logprobs[row].exp(), about.tail[row, None]])
    return p, torch.cat([log_q[ids], log_q[others].logsumexp(0, keepdim=True)])


def naive(drafter: Drafter, about: Lesson, decay: float, terms: Mapping[str, float], discard: float = 0.0) -> Tensor:
    """The objective of one lesson, node by node, from dense distributions."""
    chains, branches = about.committed, about.rejected
    depth = chains.tokens.shape[1]
    batch = pack([about], drafter.draft_row)
    total = torch.zeros((), dtype=torch.float64)
    through = [torch.ones((), dtype=torch.float64) for _ in chains.root]
    lost = torch.zeros((), dtype=torch.float64)
    drafted = [log_qs(drafter, about, k, h) for k, h in enumerate(unroll(drafter, batch.forest, depth))]
    for k, log_q in enumerate(drafted):
        committed = [c for c in range(len(chains.root)) if chains.rows[c, k] >= 0]
        value = torch.zeros((), dtype=torch.float64)
        acting = [c for c in committed if chains.proposal[c, k] >= 0]
        baseline = np.mean([chains.accepted[c, k] for c in acting]) if acting else 0.0
        for c in committed:
            p, q = on_buckets(about, int(chains.rows[c, k]), log_q[c])
            value = value + judged(terms, p, q)
            if "ntp" in terms and chains.following[c, k] >= 0:
                value = value - terms["ntp"] * log_q[c, chains.following[c, k]]
            if "policy_gradient" in terms and c in acting:
                ratio = (log_q[c, chains.proposal[c, k]] - chains.proposed[c, k]).exp()
                advantage = float(chains.accepted[c, k] - baseline)
                gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                value = value - terms["policy_gradient"] * gain * len(committed) / len(acting)
            through[c] = through[c] * torch.min(p, q.exp()).sum()
            lost = lost + 1 - through[c]
        at = [b for b in range(len(branches.chain)) if branches.step[b] == k]
        for place, b in enumerate(at, len(chains.root)):
            p, q = on_buckets(about, int(branches.row[b]), log_q[place])
            value = value + discard * judged(terms, p, q)
        total = total + decay**k * value / max(len(committed), 1)
    return total + terms.get("accept_length", 0.0) * lost / max(int((chains.rows[:, 0] >= 0).sum()), 1)


def judged(terms: Mapping[str, float], p: Tensor, log_q: Tensor) -> Tensor:
    q = log_q.exp()
    alpha = torch.min(p, q).sum()
    kl = (p * (p.log() - log_q)).sum()
    trust = torch.exp(-3 * alpha).detach()
    formulas = {
        "forward_kl": kl,
        "reverse_kl": (q * (log_q - p.log())).sum(),
        "total_variation": 1 - alpha,
        "lk_log": -alpha.log(),
        "lk_hybrid": trust * kl + (1 - trust) * (1 - alpha),
    }
    return sum((share * formulas[name] for name, share in terms.items() if name in formulas), torch.zeros(()).double())


@pytest.mark.parametrize(
    "terms",
    [
        *({name: 1.0} for name in (*DIVERGENCES, *ON_COMMITTED_TEXT)),
        {"forward_kl": 0.5, "ntp": 0.25, "policy_gradient": 2.0},
        {"lk_hybrid": 0.5, "accept_length": 0.3, "ntp": 0.1},
    ],
    ids=lambda terms: "+".join(terms),
)
def test_every_objective_equals_the_naive_sum_in_value_and_gradient(
    drafter: Drafter, random_trace: TraceMaker, terms: dict[str, float]
) -> None:
    about = exact(lesson(random_trace(4, tokens=10, temperature=0.6), 3))
    drafter.double()
    gradients = []
    for value in (
        naive(drafter, about, 0.8, terms),
        loss(drafter, pack([about], drafter.draft_row), Objective(unroll=3, terms=terms)).total,
    ):
        drafter.zero_grad()
        torch.autograd.backward(value)
        gradients.append([value.detach(), *(p.grad.clone() for p in drafter.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 10
    for expected, actual in zip(*gradients, strict=True):
        # Embeddings and temperatures stay float32, so a gradient is exact to a float32's rounding of its largest entry.
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_the_names_of_the_settings_are_the_terms_there_are() -> None:
    assert set(DIVERGENCES) == set(kernels.DIVERGENCES)
    assert all(callable(getattr(objective, name)) for name in ON_COMMITTED_TEXT)


@pytest.mark.parametrize("terms", [{"forward_kl": 1.0}, {"total_variation": 1.0, "accept_length": 1.0}])
def test_rejected_nodes_of_a_tree_are_judged_each_once(
    drafter: Drafter, trace_of: TraceMaker, terms: dict[str, float]
) -> None:
    """Trees are not drawn by chance: lambda times the same divergence, in value and gradient."""
    tree = [([13, 20, 14, 15, 21], [-1, -1, 0, 0, 1], [True, False, False, True, False], 16)] * 2
    about = exact(lesson(trace_of([10, 11], tree, first=12), 4, rejections=Rejections()))
    drafter.double()
    gradients = []
    for value in (
        naive(drafter, about, 0.8, terms, discard=0.3),
        loss(drafter, pack([about], drafter.draft_row), Objective(4, 0.8, 0.3, terms=terms)).total,
    ):
        drafter.zero_grad()
        torch.autograd.backward(value)
        gradients.append([value.detach(), *(p.grad.clone() for p in drafter.parameters() if p.grad is not None)])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_discard_zero_is_the_accept_term_alone(drafter: Drafter, random_trace: TraceMaker) -> None:
    trace = random_trace(5)
    without = loss(drafter, pack([lesson(trace, 4)], drafter.draft_row), Objective(unroll=4))
    batch = pack([lesson(trace, 4, rejections=Rejections())], drafter.draft_row)
    unused, used = (loss(drafter, batch, Objective(unroll=4, discard=amount)) for amount in (0.0, 0.5))
    torch.testing.assert_close(unused.total, without.total)
    torch.testing.assert_close(used.divergence, without.divergence)
    assert used.total > without.total


@pytest.mark.parametrize("cap", [1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rejected_nodes_weigh_by_how_likely_they_still_are(
    drafter: Drafter, trace_of: TraceMaker, temperature: float, cap: float
) -> None:
    """Two rejected nodes in line: lambda x prod min(c, q_now / q_then) x KL over the accept count of each step."""
    rounds = [([7, 8], [-1, 0], [False, False], 9)]

    def discard(*then: float) -> list[float]:
        trace = trace_of([1, 2, 3], rounds, logprobs=then, temperature=temperature)
        batch = pack([lesson(trace, 3, rejections=Rejections())], drafter.draft_row)
        # decay picks one step: 0 leaves only the first, and the rest is the difference
        by_depth = []
        for depth in (2, 3):
            totals = [
                loss(drafter, batch, Objective(depth, 1.0, amount, importance_cap=cap)).total for amount in (0.0, 1.0)
            ]
            by_depth.append(float(totals[1].detach() - totals[0].detach()))
        return [by_depth[0], by_depth[1] - by_depth[0]]

    about = lesson(trace_of([1, 2, 3], rounds), 3, rejections=Rejections())
    with torch.no_grad():
        forest = pack([about], drafter.draft_row).forest
        drafted = [log_qs(drafter, about, k, h) for k, h in enumerate(unroll(drafter, forest, 2))]
    now = [float(drafted[0][0, 7]), float(drafted[1][len(about.committed.root), 8])]
    unweighted = discard(*now)
    if temperature == 0:  # not drawn by chance: no density, no weight
        assert discard(now[0] + 2, now[1] - 2) == pytest.approx(unweighted)
        return
    for first, second in [(2.0, 0.0), (0.5, 1.5), (-3.0, 1.0), (-3.0, -3.0), (-0.5, 0.2)]:
        weights = np.minimum(cap, np.exp([-first, -second])).cumprod()
        expected = [w * of for w, of in zip(weights, unweighted, strict=True)]
        assert discard(now[0] + first, now[1] + second) == pytest.approx(expected, rel=2e-3)


def test_a_line_weighs_by_its_accepted_proposals_too(drafter: Drafter, trace_of: TraceMaker) -> None:
    def discard(then: float) -> float:
        trace = trace_of([1, 2, 3], [([7, 8], [-1, 0], [True, False], 9)], logprobs=[then, -30.0])
        batch = pack([lesson(trace, 3, rejections=Rejections())], drafter.draft_row)
        totals = [float(loss(drafter, batch, Objective(3, 1.0, amount)).total.detach()) for amount in (0.0, 1.0)]
        return totals[1] - totals[0]

    assert discard(-30.0) > discard(0.5) > 0
    assert discard(0.5) / discard(-0.5) == pytest.approx(math.exp(-1), rel=1e-2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_the_length_lost_is_what_the_recursion_of_rounds_says(alphas: list[float]) -> None:
    """One root: 1 + sum_k prod alpha, by walking through a round."""
    committed, alive = 1.0, 1.0
    for alpha in alphas:
        alive *= alpha
        committed += alive
    lost = objective.accept_length(torch.tensor([alphas], dtype=torch.float64))
    assert float(lost) == pytest.approx(len(alphas) + 1 - committed, abs=1e-12)
    assert 0 <= float(lost) <= len(alphas)


def test_a_chain_ends_where_nothing_was_recorded() -> None:
    alpha = torch.tensor([[0.5, math.nan, 0.5], [math.nan, 0.1, 0.1], [0.5, 0.5, 0.5]])
    assert objective.accept_length(alpha).tolist() == [0.5, 0.0, 0.5 + 0.75 + 0.875]


def test_a_policy_gradient_is_reinforce_until_it_is_clipped() -> None:
    then = torch.zeros(4)
    now = torch.tensor([0.0, 0.0, 0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([2.0, -1.0, 2.0, -1.0])
    torch.autograd.backward(objective.policy_gradient(now, then, advantage).sum())
    assert now.grad is not None
    assert now.grad.tolist() == [-2.0, 1.0, 0.0, 0.0]  # beyond the clip a step of its own sign gains nothing more


def test_hard_labels_on_average_teach_what_the_divergence_does() -> None:
    """E_p[-log q(x)] is KL(p || q) plus a constant, so their gradients agree."""
    p = torch.tensor([0.5, 0.3, 0.2]).double()
    z = torch.tensor([0.1, -0.4, 0.7], requires_grad=True, dtype=torch.float64)
    (kl,) = torch.autograd.grad(kernels.forward_kl(p[None], z.log_softmax(0)[None]).sum(), z)
    (hard,) = torch.autograd.grad((p * objective.ntp(z.log_softmax(0))).sum(), z)
    torch.testing.assert_close(kl, hard)


@pytest.mark.parametrize("terms", [{"forward_kl": 1.0}, {"reverse_kl": 1.0}, {"lk_hybrid": 1.0}])
def test_the_temperature_is_the_requests(drafter: Drafter, random_trace: TraceMaker, terms: dict[str, float]) -> None:
    """Scaling the head with the temperature changes nothing."""
    found = []
    for temperature in (0.5, 1.0):
        about = lesson(random_trace(9, temperature=temperature), 2)
        with torch.no_grad():
            drafter.lm_head.weight.mul_(temperature)
        found.append(loss(drafter, pack([about], drafter.draft_row), Objective(unroll=2, terms=terms)).total.detach())
        with torch.no_grad():
            drafter.lm_head.weight.div_(temperature)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


def test_a_greedy_request_may_teach_its_best_token_alone(drafter: Drafter, random_trace: TraceMaker) -> None:
    greedy, sampled = random_trace(6, temperature=0.0), random_trace(6)
    step = pack([lesson(greedy, 2)], drafter.draft_row, hard_greedy=True).steps[0]
    assert step.target.probs[:, 0].tolist() == [1.0] * len(step.rows)
    assert step.target.tail.tolist() == [0.0] * len(step.rows)
    step = pack([lesson(sampled, 2)], drafter.draft_row, hard_greedy=True).steps[0]
    assert (step.target.probs[:, 0] < 1).all()


def test_targets_are_renormalised_over_the_draft_vocabulary(drafter: Drafter, random_trace: TraceMaker) -> None:
    about = lesson(random_trace(7), 1)
    row = drafter.draft_row.clone()
    row[about.top_ids[0, 0]] = -1
    batch = pack([about], row)
    first = batch.steps[0].target
    assert first.ids[0, 0] == -1
    assert first.probs[0, 0] == 0
    torch.testing.assert_close(first.probs.sum(1) + first.tail, torch.ones(len(first.tail)))
    assert 0 < batch.excluded < 1


@pytest.mark.parametrize("name", ["forward_kl", "lk_hybrid", "accept_length"])
def test_the_drafter_learns_a_trace_by_heart(drafter: Drafter, random_trace: TraceMaker, name: str) -> None:
    batch = pack([lesson(random_trace(8), 3)], drafter.draft_row)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2, weight_decay=0)
    lengths = []
    for _ in range(60):
        found = loss(drafter, batch, Objective(unroll=3, terms={name: 1.0}))
        optimizer.zero_grad()
        torch.autograd.backward(found.total)
        optimizer.step()
        lengths.append(found.accept_length)
    assert lengths[-1] > lengths[0] + 0.6


@pytest.mark.parametrize("term", [*DIVERGENCES, *ON_COMMITTED_TEXT])
def test_parts_of_a_batch_add_up_to_the_whole(drafter: Drafter, random_trace: TraceMaker, term: str) -> None:
    """As ranks share it: unequal parts, one of them without a single proposal, the divisors of all together."""
    drafter.double()
    traces = [random_trace(1), random_trace(2, tokens=30), random_trace(3), random_trace(4, temperature=0.0)]
    lessons = [exact(lesson(trace, 3, rejections=Rejections())) for trace in traces]
    aim = Objective(unroll=3, terms={term: 1.0}, discard=0.1 if term in DIVERGENCES else 0.0)

    def learn(*parts: list[Lesson]) -> tuple[Tensor, ...]:
        batches = [pack(part, drafter.draft_row) for part in parts]
        counted = torch.stack([census(batch) for batch in batches]).sum(0)
        found = [loss(drafter, batch, aim, counted) for batch in batches]
        drafter.zero_grad()
        for one in found:
            torch.autograd.backward(one.total)
        total = torch.stack([one.total.detach() for one in found]).sum()
        measured = [torch.stack([getattr(one, n) for one in found]).sum(0) for n in ("divergence", "overlap")]
        by_lesson = torch.cat([one.by_lesson for one in found])
        return total, *measured, by_lesson, *(p.grad.clone() for p in drafter.parameters() if p.grad is not None)

    whole = learn(lessons)
    assert torch.equal(whole[0], loss(drafter, pack(lessons, drafter.draft_row), aim).total)
    for found, expected in zip(learn(lessons[:3], lessons[3:]), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
