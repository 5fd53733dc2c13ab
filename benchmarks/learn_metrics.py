"""What curves of accept length say: pure functions of expected tokens and rounds.

``Runs`` f[S, C, N, 2]: of S seeds, at C marks of the traffic, the N held-out traces' expected tokens and rounds.
Accept length is the ratio of their sums, as serving counts it: bonus token included, 1 without drafting.

Intervals are percentile bootstraps over held-out traces and seeds at once.  Sides are resampled together: they share
traces and seeds, so what a hard text or a lucky start does to both cancels.  With few seeds an interval says more of
the texts than of the starts; reports list every seed's value beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.float64]
Curve = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Three numbers, null for what is not known."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: round(x, 4) if math.isfinite(x) else None for name, x in numbers.items()}


def accept_length(scores: Runs) -> NDArray[np.float64]:
    """f[..., N, 2] -> f[...]"""
    total = scores.sum(-2)
    return np.asarray(total[..., 0] / np.maximum(total[..., 1], 1e-9))


def curve(runs: Runs) -> Curve:
    """f[C] mean over seeds of the accept length at each mark."""
    return np.asarray(accept_length(runs).mean(0))


def tokens_to(marks: Sequence[float], values: Curve, level: float) -> float:
    """Tokens of traffic at which a curve, straight between marks, first reaches ``level``; infinite if never."""
    for i, value in enumerate(values):
        if value >= level:
            if i == 0:
                return float(marks[0])
            share = (level - values[i - 1]) / (value - values[i - 1])
            return float(marks[i - 1] + share * (marks[i] - marks[i - 1]))
    return math.inf


def area(marks: Sequence[float], values: Curve) -> float:
    """Mean height of a curve over the traffic: the accept length that requests would have been served with."""
    at = np.asarray(marks, float)
    return float(((values[1:] + values[:-1]) / 2 * np.diff(at)).sum() / (at[-1] - at[0]))


def tokens_ratio(marks: Sequence[float], ours: Curve, theirs: Curve) -> float:
    """Tokens that we need for the best accept length they reach, over the tokens they need for it.

    Infinite where we never reach it; below 1 we learn faster.  Marks are shared.
    """
    level = float(theirs.max())
    needed = tokens_to(marks, theirs, level)
    return tokens_to(marks, ours, level) / needed if needed > 0 else math.nan


def worst_relative(ours: Runs, frozen: Runs, size: int) -> float:
    """Least ratio of accept lengths over all runs of ``size`` consecutive requests.

    f[S, N, 2] each, requests in their order; starts are added up, so that it is no start's worst luck.
    """
    if ours.shape[1] < size:
        raise ValueError(f"{ours.shape[1]} requests, expected at least a window of {size}")
    sums = [np.concatenate([np.zeros((1, 2)), side.sum(0).cumsum(0)]) for side in (ours, frozen)]
    ours_in, frozen_in = (total[size:] - total[:-size] for total in sums)
    return float(((ours_in[:, 0] / ours_in[:, 1]) / (frozen_in[:, 0] / frozen_in[:, 1])).min())


def bootstrap(statistic: Callable[..., float], *sides: Runs, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """``statistic`` of the sides, each f[S, C, N, 2] of the same S and N, and its 95 % percentile interval."""
    if len({(side.shape[0], side.shape[2]) for side in sides}) != 1:
        raise ValueError(f"sides of shapes {[side.shape for side in sides]}, expected the same seeds and traces")
    rng = np.random.default_rng(seed)
    seeds, _, traces, _ = sides[0].shape
    drawn = []
    for _ in range(resamples):
        which, texts = rng.integers(seeds, size=seeds), rng.integers(traces, size=traces)
        drawn.append(statistic(*(side[which][:, :, texts] for side in sides)))
    # An infinite ratio is the largest there is, not a gap in the sample.
    low, high = np.quantile(np.asarray(drawn), [0.025, 0.975], method="nearest")
    return Interval(statistic(*sides), float(low), float(high))


def bootstrap_blocks(
    statistic: Callable[[Runs, Runs], float], ours: Runs, frozen: Runs, *, block: int, seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:  # fmt: skip
    """Like ``bootstrap`` for a stream f[S, N, 2]: requests are resampled within blocks of ``block``, keeping the order.

    A window's place in the stream is what it is about; only which requests made it up is left to chance.
    """
    rng = np.random.default_rng(seed)
    seeds, count, _ = ours.shape
    first = np.arange(count) // block * block
    width = np.minimum(first + block, count) - first
    drawn = []
    for _ in range(resamples):
        which = rng.integers(seeds, size=seeds)
        chosen = first + (rng.random(count) * width).astype(int)
        drawn.append(statistic(ours[which][:, chosen], frozen[which][:, chosen]))
    low, high = np.quantile(np.asarray(drawn), [0.025, 0.975], method="nearest")
    return Interval(statistic(ours, frozen), float(low), float(high))


def of_rates(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Interval:
    """Median ratio of rates measured in turn, pair by pair, bootstrapped over pairs."""
    pairs = np.asarray(ours) / np.asarray(theirs)
    rng = np.random.default_rng(seed)
    drawn = [np.median(rng.choice(pairs, len(pairs))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(np.median(pairs)), float(low), float(high))
