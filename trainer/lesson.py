"""One trace as tensors: what was committed, what was rejected, and the target's word on each.

Positions t of a trace of T tokens x_0 .. x_{T-1}, P of them prompt.  A drafter at t reads the target's features
of t and the embedding of x_{t+1}, and predicts x_{t+2}; ``rows`` therefore asks for the target's distribution
*after* the token that a step reads.  Verification recorded it at the round's root (after the root token) and at
every node (after the node's token), so the output tokens x_P .. x_{T-1} have one row each, as far as rounds go.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from livedraft.contracts.messages import Rounds, Trace
from livedraft.traces.arrays import feature_values, to_float32, to_numpy
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Chains:
    """C lines of D drafting steps along the committed text, each hanging on one position."""

    #: i64[C] position, within the window, whose features the first step reads.
    root: Ints
    #: i64[C, D] token read at each step; the first is the committed token after ``root``.
    tokens: Ints
    #: i64[C, D] row of the target's distribution after that token; -1 where none was recorded.
    rows: Ints
    #: i64[C, D] the committed token that comes next; -1 past the end.
    following: Ints
    #: i64[C, D] token that a verify round proposed there, drawn by chance after nothing but accepted ones; -1: none.
    proposal: Ints
    #: f[C, D] log-probability with which it was drawn, and how many tokens were accepted from it on.
    proposed: Floats
    accepted: Floats


@dataclass(frozen=True)
class Branches:
    """B rejected nodes, parents before children, each read once."""

    #: i64[B] committed chain whose root they hang on.
    chain: Ints
    #: i64[B] drafting step that reads the node's token: its depth, 1 for a root's child.
    step: Ints
    #: i64[B] parent among the branches; -1: the chain itself, at the step before.
    parent: Ints
    token: Ints
    #: i64[B] row of the target's distribution after the node.
    row: Ints
    #: f[B] log-probability with which the token was proposed; 0 where it was not drawn by chance.
    proposed: Floats


@dataclass(frozen=True)
class Rejections:
    """Which rejected nodes teach; 0 sets no limit."""

    #: Deepest.
    depth: int = 0
    #: Rank, among the target's candidates there, that a token must have reached.
    topk: int = 0


@dataclass(frozen=True)
class Lesson:
    """A window of L positions of one trace.  K candidates per target row, H target hidden size."""

    #: f[L, 3H]
    features: Tensor
    #: i64[L] the token after each position.
    next_tokens: Tensor
    committed: Chains
    rejected: Branches
    #: i64[rows, K], f[rows, K], f[rows]
    top_ids: Tensor
    top_logprobs: Tensor
    tail: Tensor
    temperature: float
    greedy: bool


@dataclass(frozen=True)
class Nodes:
    """Rounds laid open.  R rounds, M nodes."""

    #: i64[M] round of each node, and its place among the round's nodes.
    round: Ints
    place: Ints
    #: i64[M] steps below the round's root: 1 for its children.
    depth: Ints
    #: i64[M] row of the target's distribution after the node.
    row: Ints
    #: i64[M] parent as an index into all nodes; -1 is the root.
    parent: Ints
    accepted: NDArray[np.bool_]
    #: i64[R] row after each round's root.
    root_row: Ints


def lay_open(rounds: Rounds) -> Nodes:
    """Where each node of each round stands."""
    size = to_numpy(rounds.size).astype(np.int64)
    first = np.cumsum(size) - size
    owner = np.repeat(np.arange(len(size)), size)
    place = np.arange(size.sum()) - first[owner]
    local = to_numpy(rounds.parents).astype(np.int64)
    parent = np.where(local < 0, -1, local + first[owner])
    depth, ancestor = np.ones_like(parent), parent
    while (ancestor >= 0).any():
        depth = depth + (ancestor >= 0)
        ancestor = np.where(ancestor >= 0, parent[ancestor], -1)
    root_row = first + np.arange(len(size))
    accepted = to_numpy(rounds.accepted).astype(bool)
    return Nodes(owner, place, depth, root_row[owner] + 1 + place, parent, accepted, root_row)


def row_after(trace: Trace, nodes: Nodes, length: int) -> Ints:
    """i64[length] row of the target's distribution after each committed token; -1 where none was recorded.

    Accepted nodes past the end (cut by a stop or a limit) are left out.
    """
    root = to_numpy(trace.rounds.root).astype(np.int64)
    rows = np.full(length, -1)
    rows[root[root < length]] = nodes.root_row[root < length]
    at = root[nodes.round] + nodes.depth
    kept = nodes.accepted & (at < length)
    rows[at[kept]] = nodes.row[kept]
    return rows


def lesson(
    trace: Trace,
    depth: int,
    *,
    start: int = 0,
    window: int | None = None,
    stale: Set[str] = frozenset(),
    rejections: Rejections | None = None,
    every: int = 1,
    skip: int = 0,
) -> Lesson:
    """The window of at most ``window`` positions from ``start`` on, with chains of ``depth`` steps.

    Chains hang on every position whose next token has a recorded target row, prompt excluded; or, after the first
    ``skip`` of these, on one in ``every``.  Rejected nodes hang on those chains if ``rejections`` says which are
    wanted.  Of rounds by drafter versions in ``stale`` neither rejections nor proposals are used.  Positions without
    features are left out.
    """
    tokens = np.concatenate([to_numpy(trace.prompt), to_numpy(trace.output)]).astype(np.int64)
    features = feature_values(trace.features)
    start = max(start, trace.features.start)
    end = min(trace.features.start + len(features), len(tokens) - 1)
    end = end if window is None else min(end, start + window)
    nodes = lay_open(trace.rounds)
    rows = row_after(trace, nodes, len(tokens))
    roots = np.arange(start, end)
    roots = roots[rows[roots + 1] >= 0]
    roots = roots[skip % max(1, len(roots)) :: every]
    rounds = _Rounds(trace, nodes, roots, stale, len(tokens))
    return Lesson(
        features=torch.tensor(features[start - trace.features.start : end - trace.features.start]),
        next_tokens=torch.from_numpy(tokens[start + 1 : end + 1]),
        committed=_committed(tokens, rows, depth, roots, start, rounds),
        rejected=_rejected(rounds, depth, rejections),
        top_ids=torch.from_numpy(to_numpy(trace.rounds.top_ids).astype(np.int64)),
        top_logprobs=torch.tensor(to_float32(trace.rounds.top_logprobs)),
        tail=torch.tensor(to_float32(trace.rounds.tail)).clamp(min=0),
        temperature=trace.top_temperature,
        greedy=trace.sampling.temperature == 0,
    )


class _Rounds:
    """The proposals of a trace, and where each hangs on the committed chains."""

    def __init__(self, trace: Trace, nodes: Nodes, roots: Ints, stale: Set[str], length: int) -> None:
        rounds = trace.rounds
        self.nodes = nodes
        self.token = to_numpy(rounds.tokens).astype(np.int64)
        self.logprob = to_float32(rounds.logprobs)
        self.top_ids = to_numpy(rounds.top_ids)
        root = to_numpy(rounds.root).astype(np.int64)
        #: i64[M] chain of a node's root, -1 without one; and whether its parent stands in the committed text.
        chain_at = np.full(length + 1, -1)
        chain_at[roots] = np.arange(len(roots))
        # A round that did not speculate names no drafter.
        drafter = np.where(to_numpy(rounds.size) > 0, to_numpy(rounds.drafter), -1)
        by_stale = np.array([*(version in stale for version in trace.drafters), False])[drafter]
        usable = ~by_stale & (root > 0)
        chain = np.where(usable, chain_at[np.clip(root - 1, 0, length)], -1)
        self.chain = chain[nodes.round]
        above = (nodes.parent < 0) | nodes.accepted[nodes.parent]
        self.on_text = above & (root[nodes.round] + nodes.depth - 1 < length)
        # Only a chain is drawn by chance: trees take the likeliest children, and have no density.
        straight = np.ones(len(root), bool)
        np.logical_and.at(straight, nodes.round, nodes.place == nodes.depth - 1)
        self.by_chance = (straight & (trace.sampling.temperature > 0))[nodes.round]
        self.kept = np.bincount(nodes.round, nodes.accepted, minlength=len(root))[nodes.round]


def _committed(tokens: Ints, rows: Ints, depth: int, roots: Ints, start: int, rounds: _Rounds) -> Chains:
    reads = roots[:, None] + 1 + np.arange(depth)
    last = len(tokens) - 1
    following = np.where(reads < last, tokens[np.minimum(reads + 1, last)], -1)
    wanted = np.where(reads <= last, rows[np.minimum(reads, last)], -1)
    nodes = rounds.nodes
    proposal = np.full(reads.shape, -1)
    proposed, accepted = np.zeros((2, *reads.shape), np.float32)
    drawn = rounds.by_chance & rounds.on_text & (rounds.chain >= 0) & (nodes.depth <= depth)
    at = rounds.chain[drawn], nodes.depth[drawn] - 1
    proposal[at], proposed[at] = rounds.token[drawn], rounds.logprob[drawn]
    accepted[at] = np.maximum(rounds.kept - (nodes.depth - 1), 0)[drawn]
    return Chains(roots - start, tokens[np.minimum(reads, last)], wanted, following, proposal, proposed, accepted)


def _rejected(rounds: _Rounds, depth: int, rejections: Rejections | None) -> Branches:
    nodes = rounds.nodes
    deepest = min(depth - 1, (rejections.depth or depth) if rejections else 0)
    taken = ~nodes.accepted & (rounds.chain >= 0) & (nodes.depth <= deepest)
    if rejections and rejections.topk:
        parent_row = np.where(nodes.parent < 0, nodes.root_row[nodes.round], nodes.row[nodes.parent])
        taken &= (rounds.top_ids[parent_row, : rejections.topk] == rounds.token[:, None]).any(1)
    # A node without its parent has nothing to hang on.
    for step in range(1, deepest + 1):
        here = nodes.depth == step
        taken[here] &= rounds.on_text[here] | taken[nodes.parent[here]]
    number = np.cumsum(taken) - 1
    kept = np.flatnonzero(taken)
    return Branches(
        chain=rounds.chain[kept],
        step=nodes.depth[kept],
        parent=np.where(rounds.on_text[kept], -1, number[nodes.parent[kept]]),
        token=rounds.token[kept],
        row=nodes.row[kept],
        proposed=np.where(rounds.by_chance, rounds.logprob, 0)[kept].astype(np.float32),
    )
