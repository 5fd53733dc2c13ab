"""Alignment, worked out by hand: which target row teaches which step."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import from_numpy, to_numpy
from livedraft.trainer.lesson import Rejections, lay_open, lesson, row_after

TraceMaker = Callable[..., Trace]

# prompt [10, 11], prefill yields 12 (position 2), then two rounds:
#   root 2 (12): proposes 13, 14, 15; 13 and 14 accepted, bonus 16     rows 0 (root) 1 2 3
#   root 5 (16): proposes 17, 18;     none accepted,      bonus 19     rows 4 (root) 5 6
# committed: 10 11 | 12 13 14 16 19        positions 0 .. 6
CHAIN = [([13, 14, 15], [-1, 0, 1], [True, True, False], 16), ([17, 18], [-1, 0], [False, False], 19)]


def test_rows_stand_after_the_tokens_they_condition_on(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN, first=12)
    assert to_numpy(trace.output).tolist() == [12, 13, 14, 16, 19]
    assert row_after(trace, lay_open(trace.rounds), 7).tolist() == [-1, -1, 0, 1, 2, 4, -1]


def test_committed_chains_by_hand(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN, first=12)
    found = lesson(trace, 3).committed
    # Position 1 is P - 1: its features and token 12 predict 13, which row 0 (after 12) judged.
    assert found.root.tolist() == [1, 2, 3, 4]
    assert found.tokens.tolist() == [[12, 13, 14], [13, 14, 16], [14, 16, 19], [16, 19, 19]]
    assert found.rows.tolist() == [[0, 1, 2], [1, 2, 4], [2, 4, -1], [4, -1, -1]]


def test_of_every_other_root_the_two_halves_are_the_whole(random_trace: TraceMaker) -> None:
    trace = random_trace(3, tokens=31)
    whole = lesson(trace, 3, rejections=Rejections())
    for every in (1, 2, 3):
        parts = [lesson(trace, 3, every=every, skip=skip, rejections=Rejections()) for skip in range(every)]
        assert sorted(r for part in parts for r in part.committed.root) == whole.committed.root.tolist()
        assert sorted(r for part in parts for r in part.rejected.row) == sorted(whole.rejected.row.tolist())
        for skip, part in enumerate(parts):
            np.testing.assert_array_equal(part.committed.tokens, whole.committed.tokens[skip::every])
            np.testing.assert_array_equal(part.committed.rows, whole.committed.rows[skip::every])
            np.testing.assert_array_equal(part.committed.proposal, whole.committed.proposal[skip::every])


def test_a_trace_of_few_roots_has_one_to_learn_from_whatever_is_skipped(trace_of: TraceMaker) -> None:
    found = lesson(trace_of([10], [([11], [-1], [False], 13)], first=12), 2, every=4, skip=3).committed
    assert len(found.root) == 1


def test_what_follows_each_token_by_hand(trace_of: TraceMaker) -> None:
    found = lesson(trace_of([10, 11], CHAIN, first=12), 3).committed
    assert found.following.tolist() == [[13, 14, 16], [14, 16, 19], [16, 19, -1], [19, -1, -1]]


def test_proposals_by_hand(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN, first=12, logprobs=[-0.1, -0.2, -0.3, -0.4, -0.5])
    found = lesson(trace, 3).committed
    # Round 1 hangs on position 1: 13 and 14 stood, 15 fell.  Round 2 on position 4: 17 fell, 18 was never looked at.
    assert found.proposal.tolist() == [[13, 14, 15], [-1, -1, -1], [-1, -1, -1], [17, -1, -1]]
    expected = np.array([[-0.1, -0.2, -0.3], [0, 0, 0], [0, 0, 0], [-0.4, 0, 0]])
    np.testing.assert_allclose(found.proposed, expected)
    assert found.accepted.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("how", ["greedy", "tree", "stale"])
def test_only_what_was_drawn_by_chance_and_lately_is_a_proposal(trace_of: TraceMaker, how: str) -> None:
    tree = [([13, 20, 14], [-1, -1, 0], [True, False, True], 16)]
    trace = trace_of([10, 11], tree if how == "tree" else CHAIN, first=12, temperature=0 if how == "greedy" else 0.7)
    found = lesson(trace, 3, stale={"1"} if how == "stale" else frozenset(), rejections=Rejections())
    assert (found.committed.proposal == -1).all()
    assert (found.rejected.proposed == 0).all()


def test_rejected_nodes_by_hand(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN, first=12, logprobs=[-0.1, -0.2, -0.3, -0.4, -0.5])
    found = lesson(trace, 4, rejections=Rejections()).rejected
    # Round 1 rejected only 15, after 13 and 14 which stand in the text; its row is 3.  Round 2: 17, then 18; 5 and 6.
    assert found.chain.tolist() == [0, 3, 3]
    assert found.step.tolist() == [3, 1, 2]
    assert found.parent.tolist() == [-1, -1, 1]
    assert found.token.tolist() == [15, 17, 18]
    assert found.row.tolist() == [3, 5, 6]
    np.testing.assert_allclose(found.proposed, [-0.3, -0.4, -0.5])


# root -> 13 -> {14, 15};  root -> 20 -> 21.   13, 15 accepted.
TREE = [([13, 20, 14, 15, 21], [-1, -1, 0, 0, 1], [True, False, False, True, False], 16)]


def test_a_rejected_tree_is_read_node_by_node(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], TREE, first=12)
    assert row_after(trace, lay_open(trace.rounds), 6).tolist() == [-1, -1, 0, 1, 4, -1]
    found = lesson(trace, 3, rejections=Rejections()).rejected
    assert found.token.tolist() == [20, 14, 21]
    assert found.step.tolist() == [1, 2, 2]
    assert found.parent.tolist() == [-1, -1, 0]
    assert found.chain.tolist() == [0, 0, 0]
    assert found.row.tolist() == [2, 3, 5]


def test_nodes_deeper_than_the_unroll_or_the_limit_are_left_out(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN, first=12)
    assert lesson(trace, 2, rejections=Rejections()).rejected.token.tolist() == [17]
    assert lesson(trace, 4, rejections=Rejections(depth=2)).rejected.token.tolist() == [17, 18]
    assert lesson(trace, 1, rejections=Rejections()).rejected.token.tolist() == []


def test_nodes_beyond_the_targets_rank_are_left_out_with_what_hangs_on_them(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN, first=12, k=8)
    ids = to_numpy(trace.rounds.top_ids).copy()
    ids[2, :3] = [1, 15, 2]  # after 14
    ids[4, :3], ids[5, :3] = [1, 2, 17], [18, 1, 2]  # after 16, after 17
    trace = msgspec.structs.replace(trace, rounds=msgspec.structs.replace(trace.rounds, top_ids=from_numpy(ids, "i4")))
    assert lesson(trace, 4, rejections=Rejections(topk=3)).rejected.token.tolist() == [15, 17, 18]
    assert lesson(trace, 4, rejections=Rejections(topk=2)).rejected.token.tolist() == [15]


def test_stale_drafters_teach_nothing_by_their_rejections(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN, first=12)
    assert len(lesson(trace, 3, stale={"1"}, rejections=Rejections()).rejected.chain) == 0
    assert len(lesson(trace, 3).rejected.chain) == 0


def test_what_hangs_on_text_that_was_cut_off_is_left_out(trace_of: TraceMaker) -> None:
    # 13, 14 accepted, 15 rejected; the request ended after 13.
    trace = trace_of([10, 11], CHAIN[:1], first=12, length=4)
    found = lesson(trace, 4, rejections=Rejections())
    assert found.rejected.token.tolist() == []
    assert found.committed.proposal.tolist() == [[13, 14, -1, -1], [-1] * 4]


def test_a_request_cut_inside_a_round_keeps_what_was_committed(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN[:1], first=12, length=4)
    found = lesson(trace, 3).committed
    assert found.root.tolist() == [1, 2]
    assert found.rows.tolist() == [[0, 1, -1], [1, -1, -1]]


def test_a_window_sees_the_same_rows_as_the_whole(trace_of: TraceMaker) -> None:
    trace = trace_of([10, 11], CHAIN, first=12)
    whole, part = lesson(trace, 3), lesson(trace, 3, start=2, window=2)
    assert part.committed.root.tolist() == [0, 1]
    assert part.committed.rows.tolist() == whole.committed.rows[1:3].tolist()
    assert part.committed.tokens.tolist() == whole.committed.tokens[1:3].tolist()
    torch.testing.assert_close(part.features, whole.features[2:4])
    assert part.next_tokens.tolist() == [13, 14]


@pytest.mark.parametrize("number", range(20))
def test_every_step_reads_its_token_and_is_judged_by_the_row_after_it(random_trace: TraceMaker, number: int) -> None:
    """Property: walk the rounds one by one, as serving did, and compare with the laid-out tables."""
    trace = random_trace(number)
    tokens = np.concatenate([to_numpy(trace.prompt), to_numpy(trace.output)])
    sizes, accepted = to_numpy(trace.rounds.size), to_numpy(trace.rounds.accepted)
    after, row, node = {}, 0, 0
    for root, size in zip(to_numpy(trace.rounds.root), sizes, strict=True):
        after[int(root)] = row
        kept = int(accepted[node : node + size].sum())
        after |= {int(root) + i: row + i for i in range(1, kept + 1)}
        row, node = row + 1 + int(size), node + int(size)
    found = lesson(trace, 4).committed
    assert set(found.root + 1) == set(after)
    for root, reads, rows in zip(found.root, found.tokens, found.rows, strict=True):
        for step in range(4):
            at = int(root) + 1 + step
            assert rows[step] == after.get(at, -1)
            if at < len(tokens):
                assert reads[step] == tokens[at]
