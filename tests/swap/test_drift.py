from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.swap.drift import DriftByDomain
from livedraft.traces.page_hinkley import PageHinkley

from .fakes import trace


def first_alarm(residuals: list[float]) -> int | None:
    test = PageHinkley()
    for n, residual in enumerate(residuals):
        test = test.observe(residual)
        if test.drifted:
            return n
    return None


def test_a_fall_is_found_within_a_few_traces() -> None:
    rng = np.random.default_rng(0)
    found = [first_alarm([*rng.normal(0, 0.5, 100), *rng.normal(-1.0, 0.5, 40)]) for _ in range(50)]
    late = [n - 100 for n in found if n is not None and n >= 100]
    assert len(late) >= 45
    assert np.median(late) <= 12


def test_without_a_change_alarms_are_rare() -> None:
    rng = np.random.default_rng(1)
    assert sum(first_alarm(list(rng.normal(0, 0.5, 300))) is not None for _ in range(100)) <= 5


@given(st.lists(st.floats(-3, 3), max_size=60), st.floats(-10, 10))
def test_a_constant_error_of_the_prediction_changes_nothing(residuals: list[float], offset: float) -> None:
    plain, shifted = PageHinkley(), PageHinkley()
    for residual in residuals:
        plain, shifted = plain.observe(residual), shifted.observe(residual + offset)
    assert shifted.sum == pytest.approx(plain.sum, abs=1e-6)
    assert shifted.peak == pytest.approx(plain.peak, abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=100))
def test_growing_acceptance_never_alarms(steps: list[float]) -> None:
    assert first_alarm(list(np.cumsum(steps))) is None


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=60))
def test_the_state_is_the_definition(residuals: list[float]) -> None:
    test = PageHinkley()
    for residual in residuals:
        test = test.observe(residual)
    means = np.cumsum(residuals) / np.arange(1, len(residuals) + 1)
    sums = np.cumsum(np.array(residuals) - means + test.slack)
    assert test.mean == pytest.approx(means[-1])
    assert test.sum == pytest.approx(sums[-1], abs=1e-9)
    assert test.peak == pytest.approx(max(0.0, sums.max()), abs=1e-9)


def test_domains_drift_apart_and_swaps_do_not_hide_it() -> None:
    drift = DriftByDomain()
    predicted = {"1": 2.0, "2": 3.0}
    calm = [trace(n, domain="prose", drafter="1", tokens=20, rounds=10) for n in range(20)]
    calm += [trace(n, domain="code", drafter="2", tokens=30, rounds=10) for n in range(20)]
    drift.observe(calm, predicted)
    assert drift.domains == set()
    drift.observe([trace(n, domain="prose", drafter="2", tokens=30, rounds=10) for n in range(20)], predicted)
    drift.observe([trace(n, domain="code", drafter="2", tokens=15, rounds=10) for n in range(20)], predicted)
    assert drift.domains == {"code"}


def test_traces_without_a_prediction_or_rounds_teach_nothing() -> None:
    drift = DriftByDomain()
    drift.observe([trace(n, drafter="9", tokens=10) for n in range(50)], {"1": 5.0})
    drift.observe([trace(n, drafter="1", rounds=0) for n in range(50)], {"1": 5.0})
    assert drift.domains == set()
