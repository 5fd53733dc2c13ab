"""Traces laid open for comparison: rounds by the tokens that lead to each node, whatever their order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import to_float32, to_numpy
from livedraft.trainer.lesson import lay_open, row_after

#: Of log-probabilities: both engines compute in float32, in different orders.
LOGPROB = 2e-3
#: Of features: bfloat16 on the way, one step of which is 2**-8 of a value.
FEATURE = 2**-7


@dataclass(frozen=True)
class Row:
    """The target's word after a node."""

    logprobs: dict[int, float]
    tail: float

    def agrees(self, other: Row) -> None:
        """Ids that only one has must tie with its last."""
        assert abs(self.tail - other.tail) < LOGPROB
        for mine, theirs in ((self, other), (other, self)):
            last = min(mine.logprobs.values())
            for token, logprob in mine.logprobs.items():
                expected = theirs.logprobs.get(token, last)
                assert abs(logprob - expected) < LOGPROB, (token, logprob, expected)


@dataclass(frozen=True)
class Node:
    """A proposal."""

    logprob: float
    accepted: bool
    row: Row


@dataclass(frozen=True)
class Round:
    """``nodes`` by the tokens from below the root down to each."""

    root: int
    bonus: int
    row: Row
    nodes: dict[tuple[int, ...], Node]

    @property
    def committed(self) -> list[int]:
        """Tokens, cut by nothing."""
        return [*max((line for line, node in self.nodes.items() if node.accepted), key=len, default=()), self.bonus]


def rounds_of(trace: Trace) -> list[Round]:
    """All rounds of a trace."""
    nodes, told = lay_open(trace.rounds), trace.rounds
    rows = [Row(dict(zip(i.tolist(), p.tolist(), strict=True)), t) for i, p, t in _rows(trace)]
    tokens, logprobs = to_numpy(told.tokens).tolist(), to_float32(told.logprobs).tolist()
    rounds = [
        Round(root, bonus, rows[row], {})
        for root, bonus, row in zip(
            to_numpy(told.root).tolist(), to_numpy(told.bonus).tolist(), nodes.root_row.tolist(), strict=True
        )
    ]
    lines: list[tuple[int, ...]] = []
    for node, token in enumerate(tokens):
        parent = int(nodes.parent[node])
        lines.append((*(lines[parent] if parent >= 0 else ()), token))
        of_round = rounds[nodes.round[node]].nodes
        assert lines[-1] not in of_round, "two nodes for one line"
        of_round[lines[-1]] = Node(logprobs[node], bool(nodes.accepted[node]), rows[nodes.row[node]])
    return rounds


def assert_same_rounds(told: Trace, expected: Trace, *, steps: int, exact: int = 99) -> None:
    """Round by round, node by node.  The embedded engine drafts no further than a request can go.

    SGLang does not move a branch's cached keys when it goes on from another branch's node: its proposals below the
    depth ``exact``, and so which nodes it keeps there, are not those of the embedded engine.
    """
    assert to_numpy(told.prompt).tolist() == to_numpy(expected.prompt).tolist()
    assert to_numpy(told.output).tolist() == to_numpy(expected.output).tolist()
    assert (told.finish_reason, told.sampling.temperature) == (expected.finish_reason, expected.sampling.temperature)
    assert told.top_temperature == expected.top_temperature
    length = len(to_numpy(told.prompt)) + len(to_numpy(told.output))
    ours, theirs = rounds_of(told), rounds_of(expected)
    if steps <= exact:
        assert [r.root for r in ours] == [r.root for r in theirs]
    by_root = {r.root: r for r in theirs}
    for mine, wanted in ((r, by_root[r.root]) for r in ours if r.root in by_root):
        mine.row.agrees(wanted.row)
        if wanted.nodes and mine.root + 1 + steps < length:
            assert steps > exact or mine.nodes.keys() == wanted.nodes.keys()
            assert steps > exact or mine.bonus == wanted.bonus
        for line, node in wanted.nodes.items():
            if line in mine.nodes:  # a shallower tree has room for nodes that a deeper one leaves out
                found = mine.nodes[line]
                assert found.accepted == node.accepted or len(line) > exact
                assert abs(found.logprob - node.logprob) < LOGPROB or len(line) > exact, (line, found, node)
                found.row.agrees(node.row)


def assert_same_target(told: Trace, expected: Trace) -> None:
    """What the target said and computed, however it was proposed: output, its words after it, features."""
    assert to_numpy(told.output).tolist() == to_numpy(expected.output).tolist()
    rows, wanted = _committed(told), _committed(expected)
    assert rows.keys() == wanted.keys()
    for position, row in rows.items():
        row.agrees(wanted[position])
    assert_same_features(told, expected)


def assert_same_features(told: Trace, expected: Trace) -> None:
    """Where both have them; each up to the last position that was computed."""
    assert told.features.layers == expected.features.layers
    ours, theirs = told.features, expected.features
    assert ours.values is not None
    assert theirs.values is not None
    assert ours.start >= theirs.start
    assert ours.start + ours.values.shape[0] == theirs.start + theirs.values.shape[0]
    np.testing.assert_allclose(
        to_float32(ours.values), to_float32(theirs.values)[ours.start - theirs.start :], rtol=FEATURE, atol=4e-3
    )


def _committed(trace: Trace) -> dict[int, Row]:
    length = len(to_numpy(trace.prompt)) + len(to_numpy(trace.output))
    rows = [*_rows(trace)]
    after = row_after(trace, lay_open(trace.rounds), length)
    return {
        at: Row(dict(zip(rows[row][0].tolist(), rows[row][1].tolist(), strict=True)), rows[row][2])
        for at, row in enumerate(after.tolist()[:-1])
        if row >= 0
    }


def _rows(trace: Trace) -> list[tuple[np.ndarray, np.ndarray, float]]:
    told = trace.rounds
    return [*zip(to_numpy(told.top_ids), to_float32(told.top_logprobs), to_float32(told.tail).tolist(), strict=True)]
