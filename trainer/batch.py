"""Lessons packed for one unroll: sequences back to back, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from livedraft.kernels.divergence import TopK
from livedraft.trainer.lesson import Chains, Lesson
from livedraft.trainer.unroll import Roots
from torch import Tensor


@dataclass(frozen=True)
class Supervision:
    """The target's word on one step of the unroll, for n of the C chains."""

    #: i64[n] chains spoken of.
    chains: Tensor
    target: TopK
    #: bool[n] True on rejected nodes.
    rejected: Tensor


@dataclass(frozen=True)
class Batch:
    """What one optimiser step learns from."""

    roots: Roots
    #: One per step of the unroll.
    steps: tuple[Supervision, ...]
    #: f[C, D] log-probability with which each token read was proposed; 0 where not drawn by chance.
    proposed: Tensor
    #: f[C]
    inverse_temperature: Tensor
    #: Committed positions supervised at the first step.
    tokens: int
    #: Mean target probability that the draft vocabulary cannot express.
    excluded: float


def pack(lessons: Sequence[Lesson], draft_row: Tensor, *, hard_greedy: bool = False) -> Batch:
    """Pack lessons; ``draft_row`` i64[V] maps target ids to rows of the drafter's head (-1: none).

    Targets are renormalised over what the head can express.  ``hard_greedy`` makes the target of a greedy
    request its best token alone, since only that one is ever accepted.
    """
    lengths = [len(lesson.next_tokens) for lesson in lessons]
    chains = [len(lesson.committed.root) + len(lesson.rejected.root) for lesson in lessons]
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), chains)
    lines = [line for lesson in lessons for line in (lesson.committed, lesson.rejected)]
    ids, probs, tail, inverse = _targets(lessons, hard_greedy)
    rows, excluded = _over_draft_vocabulary(ids, probs, tail, inverse, draft_row)
    wanted = torch.from_numpy(np.concatenate(_row_offsets(lessons)))
    rejected = torch.cat([torch.full((len(line.root),), i % 2 == 1) for i, line in enumerate(lines)])
    usable = rows.tail + rows.probs.sum(1) > 0
    steps = tuple(_supervision(wanted[:, k], rows, rejected, usable) for k in range(wanted.shape[1]))
    roots = Roots(
        features=torch.cat([lesson.features for lesson in lessons]),
        next_tokens=torch.cat([lesson.next_tokens for lesson in lessons]),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        lengths=lengths,
        chains=chains,
        root=torch.from_numpy(np.concatenate([line.root for line in lines]) + first),
        tokens=torch.from_numpy(np.concatenate([line.tokens for line in lines])),
    )
    return Batch(
        roots=roots,
        steps=steps,
        proposed=torch.from_numpy(np.concatenate([line.proposed for line in lines])),
        inverse_temperature=torch.cat(
            [torch.full((n,), 1 / lesson.temperature) for n, lesson in zip(chains, lessons, strict=True)]
        ),
        tokens=int((~steps[0].rejected).sum()),
        excluded=excluded,
    )


def _targets(lessons: Sequence[Lesson], hard_greedy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All lessons' rows as ids [n, K] (-1 where a lesson kept fewer), probabilities [n, K], tail [n], 1 / T [n]."""
    width = max(lesson.top_ids.shape[1] for lesson in lessons)
    ids, probs, tails, inverse = [], [], [], []
    for lesson in lessons:
        missing = (0, width - lesson.top_ids.shape[1])
        ids.append(torch.nn.functional.pad(lesson.top_ids, missing, value=-1))
        p = torch.nn.functional.pad(lesson.top_logprobs.exp(), missing)
        tail = lesson.tail
        if hard_greedy and lesson.greedy:
            p, tail = torch.zeros_like(p), torch.zeros_like(tail)
            p[:, 0] = 1
        probs.append(p)
        tails.append(tail)
        inverse.append(torch.full_like(tail, 1 / lesson.temperature))
    return torch.cat(ids), torch.cat(probs), torch.cat(tails), torch.cat(inverse)


def _over_draft_vocabulary(
    ids: Tensor, probs: Tensor, tail: Tensor, inverse: Tensor, draft_row: Tensor
) -> tuple[TopK, float]:
    rows = torch.where(ids >= 0, draft_row[ids.clamp(min=0)], -1)
    kept = probs.masked_fill(rows < 0, 0)
    mass = (kept.sum(1) + tail).clamp(min=torch.finfo(kept.dtype).tiny)
    excluded = 1 - float(((kept.sum(1) + tail) / (probs.sum(1) + tail)).mean()) if len(ids) else 0.0
    return TopK(rows, kept / mass[:, None], tail / mass, inverse), excluded


def _row_offsets(lessons: Sequence[Lesson]) -> list[np.ndarray]:
    """Each lesson's wanted rows, numbered over the whole batch."""
    shifted, before = [], 0
    for lesson in lessons:
        for line in (lesson.committed, lesson.rejected):
            shifted.append(_shift(line, before))
        before += len(lesson.tail)
    return shifted


def _shift(line: Chains, by: int) -> np.ndarray:
    return np.where(line.rows >= 0, line.rows + by, -1)


def _supervision(wanted: Tensor, rows: TopK, rejected: Tensor, usable: Tensor) -> Supervision:
    chains = torch.nonzero(wanted >= 0)[:, 0]
    chains = chains[usable[wanted[chains]]]
    at = wanted[chains]
    target = TopK(rows.ids[at], rows.probs[at], rows.tail[at], rows.inverse_temperature[at])
    return Supervision(chains, target, rejected[chains])
