"""What curves of accept length say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from livedraft.benchmarks.learn_metrics import (
    Interval,
    accept_length,
    area,
    bootstrap,
    bootstrap_blocks,
    curve,
    of_rates,
    tokens_ratio,
    tokens_to,
    worst_relative,
)

MARKS = [0.0, 1000.0, 3000.0]


def runs(*lengths: float, seeds: int = 2, traces: int = 5) -> np.ndarray:
    """Runs whose curve has these heights: every trace takes 10 rounds."""
    scores = np.full((seeds, len(lengths), traces, 2), 10.0)
    scores[..., 0] *= np.asarray(lengths)[None, :, None]
    return scores


def test_accept_length_weighs_traces_by_their_rounds() -> None:
    assert accept_length(np.asarray([[30.0, 10.0], [10.0, 10.0]])) == pytest.approx(2)
    assert accept_length(np.asarray([[30.0, 10.0], [30.0, 30.0]])) == pytest.approx(1.5)


def test_a_level_is_reached_between_marks_at_the_start_or_never() -> None:
    values = curve(runs(1.0, 2.0, 3.0))
    assert tokens_to(MARKS, values, 1.5) == pytest.approx(500)
    assert tokens_to(MARKS, values, 2.5) == pytest.approx(2000)
    assert tokens_to(MARKS, values, 1.0) == 0
    assert math.isinf(tokens_to(MARKS, values, 3.01))


def test_a_curve_that_falls_back_has_reached_what_it_reached_first() -> None:
    assert tokens_to(MARKS, np.asarray([1.0, 2.0, 1.2]), 1.5) == pytest.approx(500)


def test_area_is_the_mean_height_over_the_traffic() -> None:
    assert area(MARKS, np.asarray([2.0, 2.0, 2.0])) == pytest.approx(2)
    assert area(MARKS, np.asarray([1.0, 2.0, 3.0])) == pytest.approx((1.5 * 1000 + 2.5 * 2000) / 3000)


def test_the_ratio_of_tokens_is_below_one_where_ours_is_there_sooner() -> None:
    slow, fast = np.asarray([1.0, 1.2, 1.5]), np.asarray([1.0, 2.0, 2.5])
    assert tokens_ratio(MARKS, fast, slow) == pytest.approx(500 / 3000)
    assert math.isinf(tokens_ratio(MARKS, slow, fast))
    assert tokens_ratio(MARKS, slow, slow) == pytest.approx(1)


def test_the_worst_window_is_found_wherever_it_begins() -> None:
    frozen = np.ones((1, 20, 2))
    ours = np.ones((1, 20, 2))
    ours[:, 7:12, 0] = 0.5
    assert worst_relative(ours, frozen, 5) == pytest.approx(0.5)
    assert worst_relative(ours, frozen, 20) == pytest.approx(0.875)
    with pytest.raises(ValueError, match="20 requests, expected at least a window of 21"):
        worst_relative(ours, frozen, 21)


def test_the_worst_window_is_that_of_all_starts_together() -> None:
    frozen, ours = np.ones((2, 20, 2)), np.ones((2, 20, 2))
    ours[0, :5, 0] = ours[1, 10:15, 0] = 0.5
    assert worst_relative(ours, frozen, 5) == pytest.approx(0.75)


def test_sides_are_resampled_together_so_a_hard_text_cancels() -> None:
    rng = np.random.default_rng(1)
    ours = runs(1.0, 2.0, traces=30) * rng.uniform(0.5, 2, (1, 1, 30, 1))
    ours[..., 0] *= rng.uniform(0.5, 2, (1, 1, 30))
    theirs = ours / [2.0, 1.0]
    ratio = bootstrap(lambda a, b: float(curve(a)[-1] / curve(b)[-1]), ours, theirs, resamples=100)
    assert ratio.low == pytest.approx(2)
    assert ratio.high == pytest.approx(2)
    alone = bootstrap(lambda a: float(curve(a)[-1]), ours, resamples=100)
    assert alone.low < alone.value < alone.high
    with pytest.raises(ValueError, match="the same seeds and traces"):
        bootstrap(lambda a, b: 0.0, ours, ours[:, :, :7])


def test_an_interval_can_reach_to_infinity() -> None:
    level = bootstrap(lambda a: tokens_to(MARKS, curve(a), 9.0), runs(1.0, 2.0, 3.0), resamples=20)
    assert level.to_json() == {"value": None, "low": None, "high": None}


def test_requests_of_a_stream_are_resampled_within_their_blocks() -> None:
    ours = np.ones((2, 10, 2))
    ours[:, 5:, 0] = 3.0
    found = bootstrap_blocks(lambda a, _: float(a[:, :5, 0].mean()), ours, ours, block=5, resamples=50)
    assert found == Interval(1.0, 1.0, 1.0)
    short = ours[:, :8]
    rest = bootstrap_blocks(lambda a, _: float(a[:, 5:, 0].mean()), short, short, block=5, resamples=50)
    assert rest == Interval(3.0, 3.0, 3.0)


def test_starts_of_a_stream_are_resampled_too_alike_on_both_sides() -> None:
    ours = np.ones((2, 10, 2))
    ours[1, :, 0] = 3.0
    spread = bootstrap_blocks(lambda a, _: float(a[..., 0].mean()), ours, ours, block=5, resamples=100)
    assert spread == Interval(2.0, 1.0, 3.0)
    paired = bootstrap_blocks(lambda a, b: float(a.sum() / b.sum()), ours, ours, block=5, resamples=100)
    assert paired == Interval(1.0, 1.0, 1.0)


def test_rates_are_compared_pair_by_pair() -> None:
    found = of_rates([20.0, 10.0, 40.0], [10.0, 5.0, 20.0])
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
