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
from livedraft.traces.arrays import to_float32, to_numpy
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Chains:
    """C lines of D drafting steps, each hanging on one position."""

    #: i64[C] position, within the window, whose features the first step reads.
    root: Ints
    #: i64[C, D] token read at each step; the first is the committed token after ``root``.
    tokens: Ints
    #: i64[C, D] row of the target's distribution after that token; -1 where none was recorded or none is wanted.
    rows: Ints
    #: f[C, D] log-probability with which that token was proposed; 0 where it was not drawn by chance.
    proposed: NDArray[np.float32]


@dataclass(frozen=True)
class Lesson:
    """A window of L positions of one trace.  K candidates per target row, H target hidden size."""

    #: f[L, 3H]
    features: Tensor
    #: i64[L] the token after each position.
    next_tokens: Tensor
    committed: Chains
    rejected: Chains
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
    stale: Set[str] | None = None,
    every: int = 1,
    skip: int = 0,
) -> Lesson:
    """The window of at most ``window`` positions from ``start`` on, with chains of ``depth`` steps.

    Chains hang on every position whose next token has a recorded target row, prompt excluded; or, after the first
    ``skip`` of these, on one in ``every``.  Rejected nodes give one more chain per rejected leaf, except those of
    drafter versions in ``stale``; ``stale`` None leaves the rejected out.  Positions without features are left out.
    """
    tokens = np.concatenate([to_numpy(trace.prompt), to_numpy(trace.output)]).astype(np.int64)
    assert trace.features.values is not None, "admission lets only traces with features in"
    features = to_float32(trace.features.values)
    start = max(start, trace.features.start)
    end = min(trace.features.start + len(features), len(tokens) - 1)
    end = end if window is None else min(end, start + window)
    nodes = lay_open(trace.rounds)
    rows = row_after(trace, nodes, len(tokens))
    rejected = _rejected(trace, nodes, tokens, depth, start, end, stale)
    return Lesson(
        features=torch.tensor(features[start - trace.features.start : end - trace.features.start]),
        next_tokens=torch.from_numpy(tokens[start + 1 : end + 1]),
        committed=_committed(tokens, rows, depth, start, end, every, skip),
        rejected=rejected,
        top_ids=torch.from_numpy(to_numpy(trace.rounds.top_ids).astype(np.int64)),
        top_logprobs=torch.tensor(to_float32(trace.rounds.top_logprobs)),
        tail=torch.tensor(to_float32(trace.rounds.tail)).clamp(min=0),
        temperature=trace.top_temperature,
        greedy=trace.sampling.temperature == 0,
    )


def _committed(tokens: Ints, rows: Ints, depth: int, start: int, end: int, every: int, skip: int) -> Chains:
    root = np.arange(start, end)
    root = root[rows[root + 1] >= 0]
    root = root[skip % max(1, len(root)) :: every]
    reads = root[:, None] + 1 + np.arange(depth)
    inside = reads < len(tokens)
    reads = np.minimum(reads, len(tokens) - 1)
    wanted = np.where(inside, rows[reads], -1)
    return Chains(root - start, tokens[reads], wanted, np.zeros(reads.shape, np.float32))


def _rejected(
    trace: Trace, nodes: Nodes, tokens: Ints, depth: int, start: int, end: int, stale: Set[str] | None
) -> Chains:
    """A chain per rejected leaf: its line from the root, asking for the rows of rejected nodes, each once."""
    root = to_numpy(trace.rounds.root).astype(np.int64)
    drafter = to_numpy(trace.rounds.drafter)
    proposal = to_numpy(trace.rounds.tokens).astype(np.int64)
    logprob = to_float32(trace.rounds.logprobs)
    by_chance = trace.sampling.temperature > 0
    parents = set(nodes.parent.tolist())
    taken: set[int] = set()
    lines: list[tuple[int, list[int]]] = []
    if stale is not None:
        for leaf in np.flatnonzero(~nodes.accepted).tolist():
            r = int(nodes.round[leaf])
            at = int(root[r]) - 1
            if leaf not in parents and start <= at < end and trace.drafters[drafter[r]] not in stale:
                lines.append((at, _line(leaf, nodes.parent)[: depth - 1]))
    shape = (len(lines), depth)
    read, wanted = np.zeros(shape, np.int64), np.full(shape, -1)
    proposed = np.zeros(shape, np.float32)
    for i, (at, line) in enumerate(lines):
        read[i, 0] = tokens[at + 1]
        for step, node in enumerate(line, 1):
            read[i, step] = proposal[node]
            if not nodes.accepted[node] and node not in taken:
                wanted[i, step] = nodes.row[node]
                taken.add(node)
            # Only a chain is drawn by chance: trees take the likeliest children, and have no density.
            if by_chance and nodes.place[node] == nodes.depth[node] - 1:
                proposed[i, step] = logprob[node]
    return Chains(np.array([at - start for at, _ in lines], np.int64), read, wanted, proposed)


def _line(leaf: int, parent: Ints) -> list[int]:
    line = [leaf]
    while (above := int(parent[line[-1]])) >= 0:
        line.append(above)
    return line[::-1]
