"""How many tokens are drafted: as many as pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.serving.local.depth import DepthControl


def run(control: DepthControl, rounds: int, accepted: int, draft_s: float = 0.1, verify_s: float = 0.1) -> list[int]:
    """Rounds of one greedy request of whose drafts the first ``accepted`` stand; a plain pass takes 1 s."""
    depths = []
    for _ in range(rounds):
        depth = control.choose(["greedy"])
        control.costs(1, depth, draft_s * depth, 1 + verify_s * depth)
        if depth:
            control.outcome("greedy", depth, min(depth, accepted))
        depths.append(depth)
    return depths


def test_what_is_never_accepted_is_not_drafted_and_hardly_looked_at() -> None:
    control = DepthControl(limit=4, adaptive=True)
    run(control, 500, accepted=0)
    late = run(control, 2000, accepted=0)
    assert set(late) == {0, 4}
    assert late.count(4) <= 2000 / 96 + 1


def test_what_is_always_accepted_is_drafted_to_the_full() -> None:
    control = DepthControl(limit=4, adaptive=True)
    assert set(run(control, 300, accepted=4)[100:]) == {4}


def test_depth_stops_where_the_next_token_no_longer_pays() -> None:
    control = DepthControl(limit=4, adaptive=True)
    late = run(control, 600, accepted=2)[300:]
    assert max(set(late), key=late.count) == 2


def test_a_swap_is_a_reason_to_look_again() -> None:
    control = DepthControl(limit=4, adaptive=True)
    run(control, 1000, accepted=0)
    control.swapped()
    assert set(run(control, 300, accepted=4)[-100:]) == {4}


def test_after_a_swap_the_watch_gets_its_rounds_of_many_requests_though_drafting_does_not_pay() -> None:
    control = DepthControl(limit=4, adaptive=True)
    run(control, 1000, accepted=0)
    control.swapped()
    watched = run(control, 2000, accepted=0)
    assert watched.count(4) >= 1000
    assert max(watched[at : at + 100].count(4) for at in range(100, 1800)) <= 51  # every other one
    late = run(control, 1000, accepted=0)[100:]
    assert late.count(4) <= 1000 / 24


def test_requests_of_a_batch_count_one_by_one_for_the_watch() -> None:
    control = DepthControl(limit=4, adaptive=True)
    control.swapped()
    depths = []
    for _ in range(400):
        depths.append(control.choose(["greedy"] * 8))
        control.costs(8, depths[-1], 0.1 * depths[-1], 1 + 0.1 * depths[-1])
        for _ in range(8 if depths[-1] else 0):
            control.outcome("greedy", depths[-1], 0)
    assert 1000 / 8 <= depths.count(4) <= 1000 / 8 + 400 / 24


def test_traffic_that_grows_predictable_is_noticed_without_a_swap() -> None:
    control = DepthControl(limit=4, adaptive=True)
    run(control, 1000, accepted=0)
    assert run(control, 20_000, accepted=4)[-1] == 4


def test_a_pause_of_the_machine_is_forgotten() -> None:
    control = DepthControl(limit=4, adaptive=True)
    run(control, 300, accepted=4)
    control.costs(1, 4, 0.4, 1000.0)
    assert set(run(control, 200, accepted=4)[-20:]) == {4}


def test_depths_tried_in_a_busy_moment_are_tried_again() -> None:
    control = DepthControl(limit=4, adaptive=True)
    run(control, 1000, accepted=0)
    control.swapped()
    run(control, 16, accepted=3, draft_s=1.0, verify_s=1.0)
    control.swapped()
    assert set(run(control, 300, accepted=3)[-50:]) & {3, 4}


def test_costs_are_told_of_the_batch_size_served_most_that_knows_both_kinds_of_pass() -> None:
    control = DepthControl(limit=4, adaptive=True)
    assert control.measured() == ({}, {})
    for _ in range(99):
        control.costs(8, 4, 0.010, 0.020)
    assert control.measured() == ({5: 0.020}, {4: 0.010})
    for batch in [1] * 35 + [2] * 40:
        control.costs(batch, 0, 0.0, 0.004 * batch)
        control.costs(batch, 4, 0.002 * batch, 0.006 * batch)
    assert control.measured() == ({1: 0.008, 5: 0.012}, {4: 0.004})


def test_a_cost_measured_seldom_is_not_told() -> None:
    control = DepthControl(limit=4, adaptive=False)
    for _ in range(99):
        control.costs(2, 4, 0.002, 0.006)
    for _ in range(31):
        control.costs(2, 0, 0.0, 0.001)
    assert control.measured() == ({5: 0.006}, {4: 0.002})
    control.costs(2, 0, 0.0, 0.001)
    assert control.measured()[0] == {1: 0.001, 5: 0.006}


def test_a_fixed_depth_is_fixed() -> None:
    assert set(run(DepthControl(limit=3, adaptive=False), 50, accepted=0)) == {3}


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(0, 4))
def test_expected_accept_length_is_one_plus_the_products_of_acceptance(rates: list[float], depth: int) -> None:
    control = DepthControl(limit=4, adaptive=True)
    control._acceptance["greedy"] = list(rates)
    total, reach = 1.0, 1.0
    for rate in rates[:depth]:
        reach *= rate
        total += reach
    assert control.expected("greedy", depth) == pytest.approx(total)
