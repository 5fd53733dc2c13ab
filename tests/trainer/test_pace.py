"""How hard to learn and when to publish, on made-up accept lengths."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from livedraft.trainer.pace import Candidates, Pace

REST = 0.005


def live(pace: Pace, batches: list[float], domain: str = "prose", spread: float = 0.3, seed: int = 0) -> Pace:
    """Steps of these accept lengths, on four new traces each."""
    rng = np.random.default_rng(seed)
    for level in batches:
        pace = pace.stepped(level, REST)
        pace = pace.heard((domain, float(x)) for x in rng.normal(level, spread, 4))
    return pace


def growing(start: float, per_step: float, steps: int) -> list[float]:
    return [start + per_step * n for n in range(steps)]


def test_while_it_grows_it_learns_steadily() -> None:
    pace = live(Pace(), growing(1.0, 0.004, 600))
    assert (pace.mode, pace.drifts) == ("steady", 0)
    assert "grew by" in pace.reason


def test_a_domain_never_seen_is_a_drift_found_within_a_few_batches() -> None:
    pace = live(Pace(), growing(1.0, 0.004, 400))
    steps = 0
    while pace.mode == "steady" and steps < 50:
        pace = live(pace, [1.1], domain="code", seed=steps)
        steps += 1
    assert steps <= 5
    assert pace.drifts == 1
    assert "has fallen" in pace.reason


def test_a_domain_that_grows_harder_is_found_behind_one_that_goes_on() -> None:
    pace = Pace()
    for step in range(100):
        pace = pace.heard([("a", 3.0), ("b", 2.4 if step < 60 else 1.4), ("a", 3.0), ("a", 3.1), ("a", 2.9)])
    assert pace.drifts == 1
    assert pace.reason == "acceptance in domain 'b' has fallen"


def test_a_recovery_lasts_while_it_brings_much_and_then_is_over() -> None:
    pace = live(live(Pace(), [2.5] * 150), [1.1] * 8, domain="code")
    assert pace.mode == "recovering"
    pace = live(pace, growing(1.1, 0.005, 250), domain="code")
    assert pace.mode == "recovering"
    pace = live(pace, growing(2.35, 0.0003, 250), domain="code")
    assert pace.mode == "steady"


def test_without_growth_it_rests_and_a_fall_wakes_it() -> None:
    pace = live(Pace(), [3.0] * 350)
    assert pace.mode == "steady"  # one block to compare with, and two without growth
    pace = live(pace, [3.0] * 50)
    assert pace.mode == "resting"
    assert live(pace, [3.0] * 500).mode == "resting"
    assert live(pace, [1.5] * 8).mode == "recovering"
    assert live(pace, growing(3.0, 0.01, 150)).mode == "steady"


def test_below_minus_one_it_never_rests() -> None:
    pace = Pace()
    for _ in range(1000):
        pace = pace.stepped(3.0, -2.0)
    assert pace.mode == "steady"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(1, 6)), max_size=120), st.integers(0, 120))
def test_what_is_written_down_goes_on_as_the_first(heard: list[tuple[str, float]], cut: int) -> None:
    def play(pace: Pace, part: list[tuple[str, float]]) -> Pace:
        for domain, accept_length in part:
            pace = pace.stepped(accept_length, REST).heard([(domain, accept_length)])
        return pace

    middle = play(Pace(), heard[:cut])
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(middle), type=Pace)
    assert play(again, heard[cut:]) == play(Pace(), heard)


@given(st.lists(st.floats(1, 6), max_size=60))
def test_growing_acceptance_is_never_a_drift(steps: list[float]) -> None:
    assert live(Pace(), sorted(steps), spread=0.0).drifts == 0


def test_domains_without_end_do_not_fill_the_memory() -> None:
    pace = Pace().heard((f"domain {n}", 2.0) for n in range(500))
    assert len(pace.tests) == 64


# ---- candidates

RULES = Candidates(gain=0.03, least_s=8.0, most_s=30.0, published_at=100.0)


def test_a_gain_worth_a_swap_is_published_but_not_too_soon() -> None:
    seen = RULES.learned(2.0).learned(2.1)
    assert seen.due(2.1, 107.9) == (False, "8 s since the last, 8 s at least")
    assert seen.due(2.1, 108.0)[0]
    assert not RULES.learned(2.0).learned(2.05).due(2.05, 120.0)[0]


def test_after_a_fall_the_way_up_counts() -> None:
    seen = RULES.learned(3.0).learned(1.5).learned(1.6)
    due, why = seen.due(1.6, 110.0)
    assert due
    assert why == "accept length up by 6.7% since the last, 3.0% is worth a swap"
    assert not seen.published(110.0).learned(1.6).due(1.6, 120.0)[0]


@given(st.lists(st.tuples(st.floats(1, 6), st.floats(0.1, 20)), min_size=1, max_size=60))
def test_neither_too_soon_nor_too_long(steps: list[tuple[float, float]]) -> None:
    rules, now = RULES, 100.0
    for level, seconds in steps:
        now += seconds
        rules = rules.learned(level)
        due, why = rules.due(level, now)
        waited = now - rules.published_at
        assert why
        assert not due or waited >= 8.0
        assert due or waited < 30.0
        if due and waited < 30.0:
            assert level / rules.lowest - 1 >= 0.03
        if due:
            rules = rules.published(now)
