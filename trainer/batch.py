"""Lessons packed for one unroll: sequences back to back, no padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from livedraft.kernels.divergence import TopK
from livedraft.trainer.lesson import Ints, Lesson
from livedraft.trainer.unroll import Forest, Level
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Supervision:
    """What one level of the forest is taught, for n of its rows."""

    #: i64[n] rows spoken of, and the committed chain that each continues; -1 on rejected nodes.
    rows: Tensor
    chain: Tensor
    target: TopK
    #: bool[n] True on rejected nodes.
    rejected: Tensor
    #: i64[n] row of the head that stands for the committed token that came next; -1 where none does.
    following: Tensor
    #: i64[n] row of the head that stands for the token proposed next, drawn by chance; -1 where none was.
    proposal: Tensor
    #: f[n] log-probability with which it was drawn, and how many tokens were accepted from it on.
    proposed: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class Batch:
    """What one optimiser step learns from."""

    forest: Forest
    #: One per level.
    steps: tuple[Supervision, ...]
    #: Per level f[n] log-probability with which the token read was proposed; 0 where it was not drawn by chance.
    drawn: tuple[Tensor, ...]
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
    first = np.cumsum([0, *lengths[:-1]])
    ids, probs, tail, inverse = _targets(lessons, hard_greedy)
    targets, excluded = _over_draft_vocabulary(ids, probs, tail, inverse, draft_row)
    usable = targets.tail + targets.probs.sum(1) > 0
    levels = list(_levels(lessons))
    forest = Forest(
        features=torch.cat([lesson.features for lesson in lessons]),
        next_tokens=torch.cat([lesson.next_tokens for lesson in lessons]),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        lengths=lengths,
        root=torch.from_numpy(np.concatenate([x.committed.root + at for x, at in zip(lessons, first, strict=True)])),
        levels=[level.shape for level in levels],
    )
    steps = tuple(_supervision(level, targets, usable, draft_row) for level in levels)
    return Batch(
        forest=forest,
        steps=steps,
        drawn=tuple(torch.from_numpy(level.drawn) for level in levels),
        tokens=int((~steps[0].rejected).sum()),
        excluded=excluded,
    )


@dataclass(frozen=True)
class _Laid:
    """A level before it is looked up in the draft vocabulary: n rows, -1 where there is nothing."""

    shape: Level
    drawn: NDArray[np.float32]
    rejected: NDArray[np.bool_]
    #: i64[n]
    chain: Ints
    target: Ints
    following: Ints
    proposal: Ints
    #: f[n]
    proposed: NDArray[np.float32]
    accepted: NDArray[np.float32]


def _levels(lessons: Sequence[Lesson]) -> Iterator[_Laid]:
    """Of each sequence in turn: its committed chains, then the branches of that step."""
    before = [np.zeros(0, np.int64) for _ in lessons]  # place of each branch among its level's
    first = np.zeros(len(lessons), np.int64)  # of each sequence's rows in the level above
    rows_before = np.cumsum([0, *(len(lesson.tail) for lesson in lessons)])
    chains_before = np.cumsum([0, *(len(lesson.committed.root) for lesson in lessons)])
    branching = any(len(lesson.rejected.chain) for lesson in lessons)
    for k in range(lessons[0].committed.tokens.shape[1]):
        parts: list[tuple[NDArray[Any], ...]] = []
        counts, parents, places = [], [], []
        for i, lesson in enumerate(lessons):
            chains, branches = lesson.committed, lesson.rejected
            here = np.flatnonzero(branches.step == k) if k else np.zeros(0, np.int64)
            trunk, none = len(chains.root), np.full(len(here), -1)
            above = branches.parent[here]
            # Where its parent stands in the level above: on the trunk, or among that level's branches.
            hangs = np.where(above < 0, branches.chain[here], trunk + before[i][above] if k > 1 else 0)
            parents.append(first[i] + np.concatenate([np.arange(trunk), hangs]))
            place = np.zeros(len(branches.step), np.int64)
            place[here] = np.arange(len(here))
            places.append(place)
            counts.append(trunk + len(here))
            # The token that a chain reads was drawn if it is the one proposed a step earlier, and was accepted.
            taken = chains.accepted[:, k - 1] > 0 if k else np.zeros(trunk, bool)
            drawn = np.where(taken, chains.proposed[:, k - 1], 0)
            rows = np.concatenate([chains.rows[:, k], branches.row[here]])
            parts.append(
                (
                    np.concatenate([chains.tokens[:, k], branches.token[here]]),
                    np.concatenate([drawn, branches.proposed[here]]).astype(np.float32),
                    np.arange(counts[-1]) >= trunk,
                    np.concatenate([chains_before[i] + np.arange(trunk), none]),
                    np.where(rows >= 0, rows + rows_before[i], -1),
                    np.concatenate([chains.following[:, k], none]),
                    np.concatenate([chains.proposal[:, k], none]),
                    np.concatenate([chains.proposed[:, k], np.zeros(len(here), np.float32)]),
                    np.concatenate([chains.accepted[:, k], np.zeros(len(here), np.float32)]),
                )
            )
        before, first = places, np.cumsum([0, *counts[:-1]])
        tokens, *rest = (np.concatenate(part) for part in zip(*parts, strict=True))
        parent = torch.from_numpy(np.concatenate(parents)) if k and branching else None
        yield _Laid(Level(torch.from_numpy(tokens), parent, counts), *rest)


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


def _supervision(laid: _Laid, targets: TopK, usable: Tensor, draft_row: Tensor) -> Supervision:
    wanted = torch.from_numpy(laid.target)
    rows = torch.nonzero(wanted >= 0)[:, 0]
    rows = rows[usable[wanted[rows]]]

    def head_row(tokens: Ints) -> Tensor:
        ids = torch.from_numpy(tokens)[rows]
        return torch.where(ids >= 0, draft_row[ids.clamp(min=0)], -1)

    return Supervision(
        rows=rows,
        chain=torch.from_numpy(laid.chain)[rows],
        target=targets[wanted[rows]],
        rejected=torch.from_numpy(laid.rejected)[rows],
        following=head_row(laid.following),
        proposal=head_row(laid.proposal),
        proposed=torch.from_numpy(laid.proposed)[rows],
        accepted=torch.from_numpy(laid.accepted)[rows],
    )
