"""The median of differences within pairs, and how sure one may be of it, whatever they are distributed like."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def told(differences: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """The median with its interval, for a report."""
    low, high = interval(differences)
    return {
        "median": round(statistics.median(differences), digits),
        "interval_95": [round(low, digits), round(high, digits)],
        "pairs": len(differences),
    }


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Two of ``values`` between which the median of all that could be drawn lies, at ``level`` (the sign test's).

    Fewer than 6 values reach no 95 %: then it is the smallest and the largest.
    """
    ordered, n = sorted(values), len(values)
    outside, below, k = (1 - level) / 2 * 2**n, 0, 0
    while (below := below + math.comb(n, k)) <= outside:
        k += 1
    return ordered[max(0, k - 1)], ordered[min(n - 1, n - k)]
