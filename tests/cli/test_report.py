"""The demo's report: how long tokens waited for swaps."""

from __future__ import annotations

import pytest
from livedraft.cli.report import delays_ms


def steps(seconds: float, start: float = 0.0, step: float = 0.01) -> list[tuple[float, float]]:
    count = round(seconds / step)
    return [(start + n * step, start + (n + 1) * step) for n in range(count)]


def test_a_wait_at_a_swap_is_told_from_the_usual() -> None:
    gaps = [*steps(30.0), (30.0, 30.06), *steps(30.0, 30.06)]
    at_swap, elsewhere = delays_ms(gaps, [10.005, 30.02, 50.0])
    assert at_swap == pytest.approx([0.0, 50.0, 0.0], abs=0.1)
    assert elsewhere == pytest.approx((0.0, 0.0), abs=0.1)


def test_waits_as_long_everywhere_are_not_the_swaps() -> None:
    gaps, at = [], 0.0
    for n in range(3000):
        step = 0.06 if n % 25 == 0 else 0.01  # a fifth of all time is a long wait
        gaps.append((at, at + step))
        at += step
    at_swap, elsewhere = delays_ms(gaps, [gaps[n * 400][0] + 0.03 for n in range(1, 7)])
    assert at_swap == pytest.approx([50.0] * 6, abs=0.1)
    assert elsewhere == pytest.approx((50.0, 50.0), abs=0.1)


def test_without_a_swap_in_sight_nothing_is_said() -> None:
    assert delays_ms(steps(30.0), [500.0]) == ([], None)
    assert delays_ms([], [5.0]) == ([], None)
