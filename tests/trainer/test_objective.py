"""The objective: its gradients, its weights, its special cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from livedraft.contracts.messages import Trace
from livedraft.trainer.batch import pack
from livedraft.trainer.lesson import Lesson, lesson
from livedraft.trainer.model import Drafter
from livedraft.trainer.objective import Objective, loss
from livedraft.trainer.unroll import unroll

TraceMaker = Callable[..., Trace]


def exact(about: Lesson) -> Lesson:
    """A lesson in float64, so that a comparison can be tight on any processor."""
    floats = ("features", "top_logprobs", "tail")
    return replace(about, **{name: getattr(about, name).double() for name in floats})


def naive(drafter: Drafter, about: Lesson, decay: float) -> torch.Tensor:
    """Accept term of one lesson, position by position, from dense distributions."""
    depth = about.committed.tokens.shape[1]
    batch = pack([about], drafter.draft_row)
    total = torch.zeros((), dtype=torch.float64)
    for k, hidden in enumerate(unroll(drafter, batch.roots, depth)):
        terms = []
        for c, row in enumerate(about.committed.rows[:, k].tolist()):
            if row < 0:
                continue
            log_q = (drafter.lm_head(drafter.norm(hidden[c])) / about.temperature).log_softmax(0)
            ids, p, tail = about.top_ids[row], about.top_logprobs[row].exp(), about.tail[row]
            others = torch.ones_like(log_q).bool()
            others[ids] = False
            q_tail = log_q[others].exp().sum()
            terms.append((p * (p.log() - log_q[ids])).sum() + tail * (tail.log() - q_tail.log()))
        if terms:
            total = total + decay**k * torch.stack(terms).mean()
    return total


def test_accept_term_equals_the_naive_sum_in_value_and_gradient(drafter: Drafter, random_trace: TraceMaker) -> None:
    about = exact(lesson(random_trace(4, tokens=10), 3))
    drafter.double()
    gradients = []
    for value in (
        naive(drafter, about, 0.8),
        loss(drafter, pack([about], drafter.draft_row), Objective(unroll=3)).total,
    ):
        drafter.zero_grad()
        torch.autograd.backward(value)
        gradients.append([value.detach(), *(p.grad.clone() for p in drafter.parameters() if p.grad is not None)])
    for expected, actual in zip(*gradients, strict=True):
        # Weights and temperatures stay float32, so a gradient is exact to a float32's rounding of its largest entry.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_discard_zero_is_the_accept_term_alone(drafter: Drafter, random_trace: TraceMaker) -> None:
    trace = random_trace(5)
    without = loss(drafter, pack([lesson(trace, 4)], drafter.draft_row), Objective(unroll=4))
    unused = loss(drafter, pack([lesson(trace, 4, stale=set())], drafter.draft_row), Objective(unroll=4))
    used = loss(drafter, pack([lesson(trace, 4, stale=set())], drafter.draft_row), Objective(unroll=4, discard=0.5))
    torch.testing.assert_close(unused.total, without.total)
    torch.testing.assert_close(used.divergence, without.divergence)
    assert used.total > without.total


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rejected_nodes_weigh_by_how_likely_they_still_are(
    drafter: Drafter, trace_of: TraceMaker, temperature: float
) -> None:
    """One rejected node: the discard term is lambda x min(1, q_now / q_then) x its KL over the accept count."""

    def discard(then: float) -> float:
        rounds = [([7], [-1], [False], 9)]
        trace = trace_of([1, 2, 3], rounds, logprobs=[then], temperature=temperature)
        totals = [
            loss(drafter, pack([lesson(trace, 2, stale=set())], drafter.draft_row), Objective(2, 1.0, amount))
            for amount in (0.0, 1.0)
        ]
        return float(totals[1].total.detach() - totals[0].total.detach())

    batch = pack([lesson(trace_of([1, 2, 3], [([7], [-1], [False], 9)]), 1)], drafter.draft_row)
    with torch.no_grad():
        logits = drafter.lm_head(drafter.norm(next(iter(unroll(drafter, batch.roots, 1)))))[0]
    now = float((logits / 0.7).log_softmax(0)[7])
    if temperature == 0:
        assert discard(now + 2) == pytest.approx(discard(now - 2))  # not drawn by chance: no density, no weight
    else:
        assert discard(now + 2) / discard(now - 0.01) == pytest.approx(torch.tensor(-2.0).exp().item(), rel=1e-3)
        assert discard(now - 3) == pytest.approx(discard(now - 0.01), rel=1e-4)  # truncated at 1


def test_a_greedy_request_may_teach_its_best_token_alone(drafter: Drafter, random_trace: TraceMaker) -> None:
    greedy, sampled = random_trace(6, temperature=0.0), random_trace(6)
    step = pack([lesson(greedy, 2)], drafter.draft_row, hard_greedy=True).steps[0]
    assert step.target.probs[:, 0].tolist() == [1.0] * len(step.chains)
    assert step.target.tail.tolist() == [0.0] * len(step.chains)
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


def test_the_drafter_learns_a_trace_by_heart(drafter: Drafter, random_trace: TraceMaker) -> None:
    batch = pack([lesson(random_trace(8), 3)], drafter.draft_row)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2, weight_decay=0)
    lengths = []
    for _ in range(60):
        found = loss(drafter, batch, Objective(unroll=3))
        optimizer.zero_grad()
        torch.autograd.backward(found.total)
        optimizer.step()
        lengths.append(found.accept_length)
    assert lengths[-1] > lengths[0] + 1
