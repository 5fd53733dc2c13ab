"""How a drafter would have served a recorded trace: draft for real from every root, then count expected rounds.

Given the committed text, which is target-distributed whatever drafter proposed it, a proposal drawn from q is
accepted as the committed token x with probability exactly min(1, q(x) / p(x)) (Leviathan et al. 2023,
arXiv 2211.17192: Q(x) min(1, p/q) of the P(x) mass).  So from a root, the first j tokens are accepted with
probability s_j = prod_{i<=j} min(1, q(x_i) / p(x_i)); the round then commits j + 1.  Let r_t be the chance that a
round starts at token t: r_first = 1, r_{t+j+1} += r_t (s_j - s_{j+1}); the expected rounds are sum_t r_t, and the
tokens they commit sum_t r_t sum_j s_j.
Greedy is the case where each factor is 0 or 1.

Approximation: of a committed token outside the K recorded candidates only the tail's mass is known; ``_beyond``
fits a power law to it.  Measured where the tail holds 26 % of the mass (K 32, an undertrained target): accept length
within 5 % of the exact one; unbiased as the tail goes to 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from livedraft.contracts.messages import ReplayScore, Sampling, Trace
from livedraft.kernels.sampling import distribution
from livedraft.traces.arrays import tensor_bytes
from livedraft.trainer.batch import pack
from livedraft.trainer.lesson import Lesson, lesson
from livedraft.trainer.model import Drafter
from livedraft.trainer.prefill import Prefill, is_whole
from livedraft.trainer.target import read_target
from livedraft.trainer.unroll import unroll
from numpy.typing import NDArray
from torch import Tensor

_TRACES_AT_ONCE = 8
#: Prefilled traces kept for the next drafter: a gate scores three over the same ones.
_KEPT_BYTES = 1 << 30


class DraftReplay:
    """``contracts.ports.Replay`` by the training unroll, without gradients.

    ``depth`` is the number of draft tokens per round.  Scored are the rounds of full depth: not the prefill, which
    yields the first output token, nor rounds shortened because the request's length limit was near.  ``prefill``
    completes traces that came without features; without one they are left out.
    """

    def __init__(self, target_folder: Path, depth: int, *, threads: int = 1, prefill: Prefill | None = None) -> None:
        self._embedding = read_target(target_folder).embedding
        self._depth = depth
        self._threads = threads
        self._prefill = prefill
        self._filled: OrderedDict[str, Trace] = OrderedDict()

    def score(self, folder: Path, traces: Sequence[Trace]) -> list[ReplayScore]:
        """One score per trace with features and at least two output tokens.  Raises DrafterRejected."""
        torch.set_num_threads(self._threads)
        drafter = Drafter.from_checkpoint(folder, self._embedding)
        return replay(drafter, self._whole(traces, 3 * drafter.config.hidden_size), self._depth)

    def _whole(self, traces: Sequence[Trace], width: int) -> Iterator[Trace]:
        """``traces`` with what they lack, as far as it can be had; a few at a time."""
        some = iter(traces)
        while few := list(islice(some, _TRACES_AT_ONCE)):
            lacking = {trace.trace_id: trace for trace in few if not is_whole(trace, width)}
            known = {name: self._filled.pop(name) for name in lacking if name in self._filled}
            if self._prefill is not None:
                asked = [t for name, t in lacking.items() if name not in known and self._prefill.can_fill(t)]
                known |= {trace.trace_id: trace for trace in self._prefill.fill(asked)}
            self._filled |= known  # popped and set again: in order of use
            while sum(map(tensor_bytes, self._filled.values())) > _KEPT_BYTES:
                self._filled.popitem(last=False)
            yield from (known.get(trace.trace_id, trace) for trace in few)


@torch.inference_mode()
def replay(drafter: Drafter, traces: Iterable[Trace], depth: int) -> list[ReplayScore]:
    """``DraftReplay.score`` for a drafter in memory."""
    usable = (t for t in traces if can_score(t, 3 * drafter.config.hidden_size))
    scores = []
    while some := list(islice(usable, _TRACES_AT_ONCE)):
        lessons = [lesson(trace, depth + 1) for trace in some]
        for trace, accepted in zip(some, _acceptance(drafter, some, lessons, depth), strict=True):
            scores.append(_score(trace, accepted))
    return scores


def can_score(trace: Trace, width: int) -> bool:
    """Whether a trace has two output tokens or more, and all that it takes to judge a drafter of ``width`` / 3."""
    return trace.output.shape[0] > 1 and trace.prompt.shape[0] > 0 and is_whole(trace, width)


def expected_rounds(survival: NDArray[np.float64], roots: int | None = None) -> tuple[float, float]:
    """Expected rounds that start at the first ``roots`` roots (all by default), and the tokens they commit.

    ``survival`` f[n, depth + 1], non-increasing along j, is the chance that j proposals from root t are accepted;
    ``survival[t, 0]`` is 1.  Row t is the root with n - t tokens still to come.
    """
    n, width = survival.shape
    start = np.zeros(n + width)
    start[0] = 1
    exactly = survival - np.append(survival[:, 1:], np.zeros((n, 1)), axis=1)
    for t in range(n):
        start[t + 1 : t + 1 + width] += start[t] * exactly[t]
    started = start[: n if roots is None else roots]
    to_come = n - np.arange(len(started))[:, None]
    committed = (survival[: len(started)] * (np.arange(width) < to_come)).sum(1)
    return float(started.sum()), float(started @ committed)


def _score(trace: Trace, accepted: NDArray[np.float64]) -> ReplayScore:
    survival = np.concatenate([np.ones((len(accepted), 1)), accepted.cumprod(1)], 1)
    # Near a known end serving drafts less than the full depth; such rounds say nothing about the drafter.
    full = len(accepted) - accepted.shape[1]
    rounds, tokens = expected_rounds(survival, full if trace.finish_reason == "length" and full > 0 else None)
    return ReplayScore(
        trace_id=trace.trace_id,
        domain=trace.domain,
        temperature=trace.sampling.temperature,
        tokens=tokens,
        rounds=rounds,
    )


def _acceptance(
    drafter: Drafter, traces: Sequence[Trace], lessons: Sequence[Lesson], depth: int
) -> Iterator[NDArray[np.float64]]:
    """Per trace f[n, depth]: chance that each proposal from each of its n roots is accepted, given its prefix."""
    forest = pack(lessons, drafter.draft_row).forest
    chances = [torch.zeros(n, depth) for n in forest.levels[0].counts]
    for step, hidden in enumerate(unroll(drafter, forest, depth)):
        logits = torch.split(drafter.lm_head(drafter.norm(hidden)), forest.levels[step].counts)
        for i, (trace, about) in enumerate(zip(traces, lessons, strict=True)):
            chances[i][:, step] = _accepted(drafter, logits[i], about, step, trace.sampling)
    for trace, about, chance in zip(traces, lessons, chances, strict=True):
        prompt, output = trace.prompt.shape[0], trace.output.shape[0]
        first = torch.from_numpy(about.committed.root) + 1 - prompt
        to_come = output - 1 - first
        table = torch.zeros(output, depth)
        # A proposal past the end of the text cannot be judged, nor does it commit anything.
        table[first] = chance.masked_fill(torch.arange(depth) >= to_come[:, None], 0)
        yield table[:-1].double().numpy()


def _accepted(drafter: Drafter, logits: Tensor, about: Lesson, step: int, sampling: Sampling) -> Tensor:
    """f[C] chance that the proposal of ``step`` is the committed token and accepted."""
    committed = torch.from_numpy(about.committed.tokens[:, step + 1])
    if sampling.temperature == 0:
        return (drafter.draft_ids[logits.argmax(1)] == committed).float()
    rows = torch.from_numpy(about.committed.rows[:, step])
    q = distribution(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    proposed_by = drafter.draft_row[committed]
    q_x = q.gather(1, proposed_by.clamp(min=0)[:, None])[:, 0].masked_fill(proposed_by < 0, 0)
    found = about.top_ids[rows] == committed[:, None]
    recorded = about.top_logprobs[rows].exp()
    p = _filtered(recorded, about.tail[rows], sampling)
    tiny = torch.finfo(p.dtype).tiny
    ratio = (q_x / (p * found).sum(1).clamp(min=tiny)).clamp(max=1)
    beyond = _beyond(q_x, recorded, about.tail[rows])
    return torch.where(found.any(1), ratio, beyond) * (rows >= 0)


def _beyond(q_x: Tensor, recorded: Tensor, tail: Tensor) -> Tensor:
    """f[C] expected min(1, q(x) / p(x)) of a token x drawn from the part of p that was not recorded.

    With p_r = p_K (K / r)^s for ranks r > K and s set by the tail's mass, p(x) = p_K u^a with u uniform on (0, 1)
    and a = s / (s - 1) = 1 + tail / (K p_K); so for b = q / p_K < 1 the mean is (a b^(1/a) - b) / (a - 1).
    """
    least = recorded[:, -1].clamp(min=torch.finfo(recorded.dtype).tiny)
    a = 1 + (tail / (recorded.shape[1] * least)).clamp(min=1e-3)
    b = (q_x / least).clamp(max=1)
    return (a * b ** (1 / a) - b) / (a - 1)


def _filtered(p: Tensor, tail: Tensor, sampling: Sampling) -> Tensor:
    """f[C, K] recorded probabilities after top-k, then top-p, as the request drew from them."""
    if sampling.top_k > 0:
        p = p.masked_fill(torch.arange(p.shape[1]) >= sampling.top_k, 0)
        tail = tail * (sampling.top_k > p.shape[1])
    if sampling.top_p < 1:
        limit = sampling.top_p * (p.sum(1) + tail)
        before = p.cumsum(1) - p
        tail = tail.masked_fill(p.sum(1) >= limit, 0)
        p = p.masked_fill(before >= limit[:, None], 0)
    return p / (p.sum(1) + tail).clamp(min=torch.finfo(p.dtype).tiny)[:, None]
