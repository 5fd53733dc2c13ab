"""Replay: counted by simulation, proved on a drafter that is the target, and on one that is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected
from livedraft.contracts.messages import Features, Manifest, Sampling, Trace
from livedraft.traces.arrays import from_numpy, to_numpy
from livedraft.trainer.batch import pack
from livedraft.trainer.evaluate import DraftReplay, _beyond, expected_rounds, replay
from livedraft.trainer.lesson import lesson
from livedraft.trainer.model import Drafter
from livedraft.trainer.unroll import unroll

TraceMaker = Callable[..., Trace]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 999))
def test_expected_rounds_is_the_mean_of_simulated_rounds(n: int, depth: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    survival = np.concatenate([np.ones((n, 1)), rng.random((n, depth)).cumprod(1)], 1)

    def mean(t: int) -> float:
        """Rounds still needed from root ``t``, by conditioning on what this round commits."""
        if t >= n:
            return 0.0
        exactly = survival[t] - np.append(survival[t, 1:], 0)
        return 1 + sum(float(p) * mean(t + j + 1) for j, p in enumerate(exactly))

    rounds, tokens = expected_rounds(survival)
    if n <= 8:
        assert rounds == pytest.approx(mean(0))
    assert tokens == pytest.approx(n)
    assert n / (depth + 1) - 1e-9 <= rounds <= n + 1e-9


def test_no_acceptance_is_a_round_a_token_and_full_acceptance_divides_by_depth_plus_one() -> None:
    never, always = np.eye(1, 4).repeat(12, 0), np.ones((12, 4))
    assert expected_rounds(never) == (12, 12)
    assert expected_rounds(always) == (3, 12)
    assert expected_rounds(always, 9) == (3, 12)
    assert expected_rounds(always, 8) == (2, 8)


def greedy_text(drafter: Drafter, trace: Trace, depth: int) -> list[int]:
    """The chain that serving would draft from the last usable root, by its own argmax tokens."""
    reads = [int(t) for t in lesson(trace, depth + 1).committed.tokens[0, :1]]
    for step in range(depth):
        about = lesson(trace, depth + 1)
        about.committed.tokens[0, : len(reads)] = reads
        outputs = list(unroll(drafter, pack([about], drafter.draft_row).forest, step + 1))
        reads.append(int(drafter.draft_ids[drafter.lm_head(drafter.norm(outputs[-1][0])).argmax()]))
    return reads[1:]


@torch.no_grad()
def test_greedy_acceptance_is_exact(drafter: Drafter, random_trace: TraceMaker) -> None:
    """Write the drafter's own chain into the text: then one round commits depth + 1 tokens from the first root."""
    depth = 3
    trace = random_trace(1, temperature=0.0)
    chain = greedy_text(drafter, trace, depth)
    output = to_numpy(trace.output).copy()
    wrong = [(t + 1) % 40 for t in chain]
    for accepted in range(depth + 1):
        text = output[: depth + 2].copy()
        text[1 : 1 + depth] = chain[:accepted] + wrong[accepted:]
        cut = msgspec.structs.replace(trace, output=from_numpy(text, "i4"))
        (score,) = replay(drafter, [cut], depth)
        # The first of depth + 1 roots is the only one with a full round ahead of it.
        assert (score.rounds, score.tokens) == (1, accepted + 1)


SAMPLINGS = [Sampling(temperature=0.7, top_k=k, top_p=p) for k, p in ((0, 1.0), (3, 1.0), (0, 0.8), (5, 0.9))]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@torch.no_grad()
def test_a_drafter_that_is_the_target_is_always_accepted(
    drafter: Drafter, random_trace: TraceMaker, sampling: Sampling
) -> None:
    """Record q as p, over text it could have drawn: then a round of one proposal commits two tokens."""

    def likeliest(trace: Trace) -> tuple[torch.Tensor, torch.Tensor]:
        (hidden,) = unroll(drafter, pack([lesson(trace, 1)], drafter.draft_row).forest, 1)
        p, ids = (drafter.lm_head(drafter.norm(hidden)) / 0.7).softmax(1).topk(8, 1)
        return p, ids

    trace = random_trace(2, sampling=sampling, finish_reason="stop")
    output = to_numpy(trace.output).copy()
    for at in range(1, len(output)):
        output[at] = likeliest(msgspec.structs.replace(trace, output=from_numpy(output, "i4")))[1][at - 1, 0]
    trace = msgspec.structs.replace(trace, output=from_numpy(output, "i4"))
    rows = lesson(trace, 1).committed.rows[:, 0]
    p, ids = np.zeros((rows.max() + 1, 8)), np.zeros((rows.max() + 1, 8), int)
    p[rows], ids[rows] = (found.numpy() for found in likeliest(trace))
    rounds = msgspec.structs.replace(
        trace.rounds,
        top_ids=from_numpy(ids, "i4"),
        top_logprobs=from_numpy(np.log(p + 1e-30), "f4"),
        tail=from_numpy(1 - p.sum(1), "f4"),
    )
    (score,) = replay(drafter, [msgspec.structs.replace(trace, rounds=rounds)], 1)
    assert score.tokens == pytest.approx(len(output) - 1, abs=0.01)
    assert score.rounds == pytest.approx(np.ceil(score.tokens / 2), abs=0.01)


@torch.no_grad()
def test_sampled_acceptance_is_unbiased(drafter: Drafter, trace_of: TraceMaker) -> None:
    """Over text drawn from p, the chance of accepting one proposal averages to sum min(p, q)."""
    prompt = [3, 4, 5]
    trace = trace_of(prompt, [([], [], [], 9)], k=40)
    about = lesson(trace, 2)
    (hidden,) = unroll(drafter, pack([about], drafter.draft_row).forest, 1)
    q = (drafter.lm_head(drafter.norm(hidden))[0] / 0.7).softmax(0)
    p = torch.zeros(40)
    p[about.top_ids[0]] = about.top_logprobs[0].exp()
    mean = 0.0
    for token in range(40):
        text = trace_of(prompt, [([], [], [], token), ([], [], [], 0)], k=40, finish_reason="stop")
        mean += float(p[token]) * _first_acceptance(drafter, text, trace)
    assert mean == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-4)


def _first_acceptance(drafter: Drafter, text: Trace, recorded: Trace) -> float:
    """P(accept) at the first of two roots: rounds = 2 - P."""
    ids = np.concatenate([to_numpy(recorded.rounds.top_ids)] * 2)
    logprobs = np.concatenate([to_numpy(recorded.rounds.top_logprobs)] * 2)
    rounds = msgspec.structs.replace(
        text.rounds, top_ids=from_numpy(ids, "i4"), top_logprobs=from_numpy(logprobs, "f4")
    )
    assert recorded.features.values is not None
    values = np.concatenate([to_numpy(recorded.features.values), np.zeros((1, 48), np.float32)])
    features = Features(mode="inline", layers=(1, 3, 4), values=from_numpy(values, "f4"))
    (score,) = replay(drafter, [msgspec.structs.replace(text, rounds=rounds, features=features)], 1)
    return 2 - score.rounds


def test_scores_by_folder_and_leaves_out_what_cannot_be_scored(
    drafter: Drafter, random_trace: TraceMaker, target_folder: Path, tmp_path: Path
) -> None:
    manifest = Manifest(tensors={}, target="tiny", target_revision="r", tokenizer_hash="h")
    checkpoint.write(tmp_path / "d", drafter.config, drafter.to_arrays(), manifest)
    traces = [random_trace(n) for n in range(11)]
    traces[4] = msgspec.structs.replace(traces[4], features=Features(mode="recompute"))
    scorer = DraftReplay(target_folder, depth=3)
    scores = scorer.score(tmp_path / "d", traces)
    assert [s.trace_id for s in scores] == [t.trace_id for i, t in enumerate(traces) if i != 4]
    assert all(s.tokens / 4 <= s.rounds <= s.tokens for s in scores)
    with pytest.raises(DrafterRejected):
        scorer.score(tmp_path / "absent", traces)


def test_a_token_of_the_tail_is_accepted_as_often_as_a_power_law_says() -> None:
    ranks = torch.arange(1, 200_001).double()
    p = ranks**-1.3 / (ranks**-1.3).sum()
    recorded, tail = p[:32][None], p[32:].sum()[None]
    for q in (1e-5, 1e-4, 1e-3):
        expected = (p[32:] * (q / p[32:]).clamp(max=1)).sum() / tail
        found = _beyond(torch.tensor([q]).double(), recorded, tail)
        assert float(found) == pytest.approx(float(expected), rel=0.15)
