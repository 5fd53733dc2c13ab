"""The demo's report: numbers, table, plot."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from livedraft.cli.compare import Comparison
from livedraft.cli.provenance import provenance, write
from livedraft.cli.traffic import TEMPERATURES, Served
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from livedraft.cli.demo import Run

#: Requests in a moving average.
_WINDOW = 20
#: Sets of instants without a swap that stand for the usual.
_DRAWS = 200
#: Share of the requests that a watch wants, below which its comparison is not counted.
_SEEN = 0.5
_COLOURS = {0.0: "#1f6f8b", 0.7: "#d9822b"}


def build(run: Run, comparison: Comparison, version: str, restarts: Sequence[int]) -> dict[str, Any]:
    """``report.json``."""
    report: dict[str, Any] = {}
    for temperature in TEMPERATURES:
        report[f"{temperature:g}"] = _at(run, comparison, temperature)
    watched = [d for d in run.decisions if "relative_error" in d.evidence]
    # A watch that the traffic left, as at the shift, has seen too few requests to say anything of the gate.
    kept = [d.evidence["relative_error"] for d in watched if d.action == "rollback" or d.evidence["seen"] >= _SEEN]
    swaps = [d for d in run.decisions if d.action == "promote"]
    errors = [d.evidence["predicted_error"] for d in swaps if "predicted_error" in d.evidence]
    gaps = [(a, b) for s in run.served for a, b in itertools.pairwise(s.arrivals)]
    delays, elsewhere = delays_ms(gaps, [d.evidence.get("applied_at", d.at) for d in swaps])
    report |= {
        "swaps": {
            "applied": len(swaps),
            "rolled_back": sum(d.action == "rollback" for d in run.decisions),
            "rejected": sum(d.action == "reject" for d in run.decisions),
            "max_token_delay_ms": max(delays, default=None),
            # Of each swap, in their order.
            "token_delays_ms": delays,
            # The yardstick: how long tokens wait on this machine when nothing is swapped, as often as not.
            "max_delay_without_swap_ms": elsewhere[0] if elsewhere else None,
            # Which as many instants without a swap pass once in twenty times.
            "max_delay_without_swap_p95_ms": elsewhere[1] if elsewhere else None,
            "max_stall_ms": round(max((d.evidence.get("stall_s", 0.0) for d in swaps), default=0.0) * 1e3, 3),
        },
        "gate": {
            "max_relative_error": round(max(kept, default=0.0), 4),
            "median_relative_error": round(statistics.median(kept), 4) if kept else None,
            "watched": len(kept),
            "cut_short": len(watched) - len(kept),
            # What the gate itself said that its predictions are good to, as a standard error.
            "median_predicted_error": round(statistics.median(errors), 4) if errors else None,
        },
        "lossless": {"checked": comparison.checked, "mismatches": comparison.mismatches},
        "requests": {"before_shift": run.shifted_at, "after_shift": len(run.served) - run.shifted_at},
        "live_version": version,
        "restarts": sum(restarts),
        "seconds": round(run.served[-1].ended - run.started),
        "provenance": provenance(),
    }
    return report


def _at(run: Run, comparison: Comparison, temperature: float) -> dict[str, Any]:
    rates = {side: comparison.rates[side, temperature] for side in ("no_speculation", "static", "live")}
    over_plain = [a / b for a, b in zip(rates["live"], rates["no_speculation"], strict=True)]
    over_static = [a / b for a, b in zip(rates["live"], rates["static"], strict=True)]
    return {
        "accept_length": {
            "day0": round(comparison.accept_length("day0", temperature), 3),
            "static": round(comparison.accept_length("static", temperature), 3),
            "final": round(comparison.accept_length("live", temperature), 3),
            "served": round(comparison.served_accept_length("live", temperature), 3),
        },
        "tokens_per_second": {side: round(statistics.median(values), 1) for side, values in rates.items()},
        "speedup": {
            "over_no_speculation": round(statistics.median(over_plain), 3),
            "over_static_after_shift": round(statistics.median(over_static), 3),
            "over_no_speculation_quartiles": [round(q, 3) for q in statistics.quantiles(over_plain, n=4)[::2]],
            "over_static_quartiles": [round(q, 3) for q in statistics.quantiles(over_static, n=4)[::2]],
        },
        "requests_to_recover": _requests_to_recover(run, temperature),
    }


def _requests_to_recover(run: Run, temperature: float) -> int | None:
    """Requests (of both temperatures) from the shift until the moving average reaches 90 % of its final level."""
    after = [(i, s) for i, s in enumerate(run.served[run.shifted_at :], 1) if s.temperature == temperature]
    if len(after) < 3 * _WINDOW:
        return None
    line = _moving([s for _, s in after])
    goal = 0.9 * statistics.mean(line[-2 * _WINDOW :])
    return next((after[at][0] for at, value in enumerate(line) if at >= _WINDOW - 1 and value >= goal), None)


def _moving(served: Sequence[Served]) -> list[float]:
    """Accept length over the last ``_WINDOW`` requests at each request."""
    line = []
    for end in range(1, len(served) + 1):
        window = served[max(0, end - _WINDOW) : end]
        line.append(sum(s.tokens - 1 for s in window) / max(1, sum(s.rounds for s in window)))
    return line


def delays_ms(
    gaps: Sequence[tuple[float, float]], swaps: Sequence[float]
) -> tuple[list[float], tuple[float, float] | None]:
    """Longest wait for a chunk that spanned each swap, beyond the usual wait (the 95th percentile of all); and the
    longest of as many instants of the same time without a swap within 1 s: median and 95th percentile over ``_DRAWS``
    sets of them.

    ``gaps``: (from, to) in Unix seconds; ``swaps``: Unix seconds.
    """
    if len(gaps) < 100 or not any(a <= at <= b for a, b in gaps for at in swaps):
        return [], None
    usual = statistics.quantiles((b - a for a, b in gaps), n=20)[-1]
    longer = [(a, b) for a, b in gaps if b - a > usual]

    def longest(at: float) -> float:
        return round(max((b - a - usual for a, b in longer if a <= at <= b), default=0.0) * 1e3, 2)

    around = [longest(at) for at in swaps]
    rng, first, last = random.Random(0), min(swaps), max(b for _, b in gaps)
    drawn = [rng.uniform(first, last) for _ in range(100 * len(swaps))]
    calm = [at for at in drawn if all(abs(at - swap) > 1.0 for swap in swaps)]
    if len(calm) < len(swaps):
        return around, None
    waits = [longest(at) for at in calm]
    most = [max(rng.sample(waits, len(swaps))) for _ in range(_DRAWS)]
    return around, (statistics.median(most), statistics.quantiles(most, n=20)[-1])


def show(report: dict[str, Any], out: Path, registry: str, console: Console) -> None:
    """The closing table, and where everything is."""
    write(report, out / "report.json")
    table = Table(title="Python source, after the shift (batch 1, interleaved)", title_justify="left")
    for name in ("", "temperature 0", "temperature 0.7"):
        table.add_column(name, justify="right" if name else "left")
    both = [report["0"], report["0.7"]]
    rows = {
        "accept length, day 0": [f"{r['accept_length']['day0']:.2f}" for r in both],
        "accept length, frozen at the shift": [f"{r['accept_length']['static']:.2f}" for r in both],
        "accept length, live": [f"{r['accept_length']['final']:.2f}" for r in both],
        "  with the depth chosen for speed": [f"{r['accept_length']['served']:.2f}" for r in both],
        "tokens/s, no speculation": [f"{r['tokens_per_second']['no_speculation']:.0f}" for r in both],
        "tokens/s, frozen": [f"{r['tokens_per_second']['static']:.0f}" for r in both],
        "tokens/s, live": [f"{r['tokens_per_second']['live']:.0f}" for r in both],
        "speedup over no speculation": [f"{r['speedup']['over_no_speculation']:.2f}x" for r in both],
        "speedup over frozen": [f"{r['speedup']['over_static_after_shift']:.2f}x" for r in both],
        "requests to recover": [str(r["requests_to_recover"]) for r in both],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    swaps, lossless = report["swaps"], report["lossless"]
    console.print(
        f"{swaps['applied']} swaps, {swaps['rolled_back']} rolled back, {swaps['rejected']} candidates rejected; "
        f"{lossless['checked']} greedy answers checked, {lossless['mismatches']} differ from the target's."
    )
    console.print(f"Report: {out / 'report.json'}   plot: {out / 'report.png'}")
    console.print(
        f"The registry was at {registry}; look again with: mlflow server --port 5000 "
        f"--backend-store-uri sqlite:///{out / 'mlflow' / 'mlflow.db'} "
        f"--artifacts-destination {out / 'mlflow' / 'artifacts'}"
    )


def draw(run: Run, comparison: Comparison, place: Path) -> None:
    """``report.png``: accept length and speed over the requests, swaps and the shift marked, and the comparison."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(11, 11), height_ratios=[3, 2, 2], layout="constrained")
    numbers = {t: [i for i, s in enumerate(run.served) if s.temperature == t] for t in TEMPERATURES}
    swapped = [d.at for d in run.decisions if d.action == "promote"]
    places = [next((i for i, s in enumerate(run.served) if s.ended >= at), len(run.served)) for at in swapped]
    for axis in (top, middle):
        for at in places:
            axis.axvline(at, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.axvline(run.shifted_at, color="#b03a2e", linestyle="--", linewidth=1.2)
    for temperature, where in numbers.items():
        chosen = [run.served[i] for i in where]
        colour, label = _COLOURS[temperature], f"temperature {temperature:g}"
        top.plot(where, _moving(chosen), color=colour, label=label)
        speeds = [s.tokens / (s.ended - s.started) for s in chosen]
        smooth = [statistics.median(speeds[max(0, i - _WINDOW + 1) : i + 1]) for i in range(len(speeds))]
        middle.plot(where, smooth, color=colour, label=label)
    top.set_ylabel(f"accept length\n(last {_WINDOW} requests)")
    top.set_title("A drafter that knew nothing, learning from live traffic (grey: swap, red: prose to code)")
    top.annotate(
        " prose | code ", (run.shifted_at, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top",
        color="#b03a2e", backgroundcolor="white", fontsize=9,
    )  # fmt: skip
    top.axhline(1, color="black", linewidth=0.6)
    top.legend(loc="upper left")
    middle.set_ylabel("tokens/s of a request\n(while learning)")
    middle.set_xlabel("requests served")
    middle.set_ylim(bottom=0)
    sides = {"no_speculation": "no speculation", "static": "frozen at the shift", "live": "live loop"}
    for offset, temperature in enumerate(TEMPERATURES):
        rates = [comparison.rates[side, temperature] for side in sides]
        heights = [statistics.median(r) for r in rates]
        spread = [[h - statistics.quantiles(r, n=4)[0] for h, r in zip(heights, rates, strict=True)],
                  [statistics.quantiles(r, n=4)[2] - h for h, r in zip(heights, rates, strict=True)]]  # fmt: skip
        spots = [i + (offset - 0.5) * 0.38 for i in range(len(sides))]
        bars = bottom.bar(spots, heights, 0.36, yerr=spread, capsize=3, color=_COLOURS[temperature],
                          label=f"temperature {temperature:g}")  # fmt: skip
        lengths = [comparison.served_accept_length(side, temperature) for side in sides]
        bottom.bar_label(bars, [f"{h:.0f}\nAL {a:.2f}" for h, a in zip(heights, lengths, strict=True)],
                         label_type="center", color="white", fontsize=9)  # fmt: skip
    bottom.set_xticks(range(len(sides)), list(sides.values()))
    bottom.set_ylabel("tokens/s on code\n(median, quartiles)")
    bottom.legend(loc="upper left")
    figure.savefig(place, dpi=110)
    plt.close(figure)
