"""The report of ``livedraft bench learn``: numbers, tables, plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from livedraft.benchmarks.learn_learners import EPOCHS, ONE_PASS, OURS
from livedraft.benchmarks.learn_metrics import (
    Interval,
    Runs,
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
from livedraft.benchmarks.learn_traces import DOMAINS, TEMPERATURES, Sizes, TraceSets
from livedraft.contracts.messages import Trace
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from livedraft.benchmarks.learn import Run

#: Requests in the window that the worst moment after the shift is looked for in.
_WORST_OF = 50
_UNKNOWN = Interval(math.nan, math.nan, math.nan)
#: What cannot be measured here.
NOT_ON_A_CPU = {
    "specforge's speed": (
        "its EAGLE-3 loss is a Triton kernel (specforge 0.2.0, core/loss.py, line 185), which without a GPU ends with "
        "'RuntimeError: 0 active drivers'. The full run executes it in Triton's interpreter, to see what it learns; "
        "its published loss also runs in our code."
    )
}
_METHOD = (
    "95 % percentile bootstrap over held-out traces and seeds together, 2000 resamples, sides resampled alike; "
    "of the shift's windows, over requests within windows; of rates, over pairs of runs"
)


def build(runs: Sequence[Run], sets: TraceSets, costs: Mapping[str, float], sizes: Sizes) -> dict[str, Any]:
    """Everything that was measured; ``learn`` adds who and where."""
    held_out = sets.read("held-out")
    report: dict[str, Any] = {"summary": {}, "scenarios": {}}
    for scenario in dict.fromkeys(run.scenario for run in runs):
        sides: dict[str, list[Run]] = {}
        for run in runs:
            if run.scenario == scenario:
                sides.setdefault(run.learner.name, []).append(run)
        data = {name: _Side(of, held_out) for name, of in sides.items()}
        found = {name: side.to_json(costs) for name, side in data.items()}
        for name, side in data.items():
            found[name]["final_over_default"] = (_final_ratio(side, data[OURS]) if OURS in data else _UNKNOWN).to_json()
        report["scenarios"][scenario.name] = found
        if scenario.name == "day0":
            report["summary"] |= _day0(data)
        if scenario.ends:
            report["shift"] = {name: side.shift() for name, side in data.items()}
            if OURS in data:
                report["summary"] |= _shift_summary(report["shift"][OURS], data)
    report["sets"] = _sets(sets)
    report["costs"] = dict(costs)
    report["intervals"] = _METHOD
    report["sizes"] = {"held_out_traces": len(held_out), "phases": sizes.phases}
    return report


class _Side:
    """A learner's runs on one set."""

    def __init__(self, runs: Sequence[Run], held_out: Sequence[Trace]) -> None:
        self.runs = runs
        self.marks = [run.marks() for run in runs]
        self.scores = [run.scores() for run in runs]
        self.tokens = [float(mark.tokens) for mark in self.marks[0]]
        #: f[S, C, N, 2]
        self.all: Runs = np.asarray([scores.held_out for scores in self.scores])
        self.domain = np.asarray([trace.domain for trace in held_out])
        self.temperature = np.asarray([trace.sampling.temperature for trace in held_out])

    def of(self, *, domain: str | None = None, temperature: float | None = None) -> Runs:
        """Only some of the held-out traces."""
        chosen = np.ones(len(self.domain), bool)
        if domain is not None:
            chosen &= self.domain == domain
        if temperature is not None:
            chosen &= self.temperature == temperature
        return self.all[:, :, chosen]

    @property
    def rates(self) -> list[float]:
        """Supervised positions per processor second, of each seed."""
        return [marks[-1].trained / max(marks[-1].cpu_s, 1e-9) for marks in self.marks]

    def to_json(self, costs: Mapping[str, float]) -> dict[str, Any]:
        line = curve(self.all)
        plain, drafting = costs["plain_round_s"], costs["drafting_round_s"]
        return {
            "tokens": self.tokens,
            "accept_length": _rounded(line),
            "accept_length_by_seed": [_rounded(accept_length(one)) for one in self.all],
            "accept_length_at": {f"{t:g}": _rounded(curve(self.of(temperature=t))) for t in TEMPERATURES},
            "accept_length_on": {d: _rounded(curve(self.of(domain=d))) for d in DOMAINS},
            # The engine drafts to the full or not at all, whichever is faster; what choosing a depth adds is left out.
            "goodput_tokens_per_s": _rounded(np.maximum(1 / plain, line / drafting), 1),
            "final": bootstrap(lambda side: float(curve(side)[-1]), self.all).to_json(),
            "area": bootstrap(lambda side: area(self.tokens, curve(side)), self.all).to_json(),
            "tokens_to_90_percent_of_final": bootstrap(
                lambda side: tokens_to(self.tokens, curve(side), 0.9 * curve(side)[-1]), self.all
            ).to_json(),
            "tokens_to_accept_length_2": bootstrap(
                lambda side: tokens_to(self.tokens, curve(side), 2.0), self.all
            ).to_json(),
            "trained_tokens_per_cpu_s": round(float(np.median(self.rates)), 1),
            "steps": self.marks[0][-1].steps,
            "passes": round(self.marks[0][-1].trained / max(self.tokens[-1], 1), 2),
            "cpu_s": round(float(np.median([marks[-1].cpu_s for marks in self.marks])), 1),
            "peak_rss_mb": max(marks[-1].peak_rss_mb for marks in self.marks),
            "rss_before_learning_mb": max(marks[0].peak_rss_mb for marks in self.marks),
            "seeds": len(self.runs),
        }

    def shift(self) -> dict[str, Any]:
        """What became of accept lengths when the traffic changed and came back."""
        scenario = self.runs[0].scenario
        shifted, returned, end = scenario.ends
        block = scenario.window
        ours, frozen = (
            np.asarray([[request for window in windows for request in window] for windows in sides])
            for sides in ([one.ahead for one in self.scores], [one.frozen for one in self.scores])
        )
        prose, code = self.of(domain="prose"), self.of(domain="code")

        def at(side: Runs, mark: int) -> float:
            return float(curve(side)[mark])

        def relative(a: Runs, b: Runs) -> float:
            return worst_relative(a, b, _WORST_OF)

        windows = range(0, ours.shape[1] - block + 1, block)
        by_seed = [relative(one[None], other[None]) for one, other in zip(ours, frozen, strict=True)]
        return {
            "min_relative_al": bootstrap_blocks(relative, ours, frozen, block=block).to_json(),
            "min_relative_al_by_seed": _rounded(by_seed),
            "code_over_prose": bootstrap_two(lambda b, a: at(b, returned) / at(a, shifted), code, prose).to_json(),
            "tokens_to_90_percent_after_shift": _finite(
                tokens_to(
                    self.tokens[shifted : returned + 1],
                    curve(code)[shifted : returned + 1],
                    0.9 * at(code, returned),
                )
                - self.tokens[shifted]
            ),
            "forgetting": bootstrap(lambda a: 1 - at(a, returned) / at(a, shifted), prose).to_json(),
            "forgetting_by_seed": _rounded([1 - at(one, returned) / at(one, shifted) for one in prose[:, None]]),
            "after_return": bootstrap(lambda a: at(a, end) / at(a, shifted), prose).to_json(),
            "served": _rounded([float(accept_length(ours[:, i : i + block]).mean()) for i in windows]),
            "frozen": _rounded([float(accept_length(frozen[:, i : i + block]).mean()) for i in windows]),
            "first_request": int(shifted * block),
            "window": block,
            "phase_ends_tokens": [self.tokens[end] for end in scenario.ends],
        }


def bootstrap_two(statistic: Callable[[Runs, Runs], float], first: Runs, second: Runs) -> Interval:
    """``bootstrap`` of two sides over different texts: each resamples its own."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        seeds = rng.integers(len(first), size=len(first))
        sides = [side[seeds][:, :, rng.integers(side.shape[2], size=side.shape[2])] for side in (first, second)]
        drawn.append(statistic(sides[0], sides[1]))
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
    return Interval(statistic(first, second), float(low), float(high))


def _day0(data: Mapping[str, _Side]) -> dict[str, Any]:
    """Ours against the peers' objective in our code, by tokens of traffic and at equal processor time."""
    found: dict[str, Any] = {}
    ours = data.get(OURS)
    for suffix, name in (("", ONE_PASS), ("_same_cpu", EPOCHS)):
        theirs = data.get(name)
        pair = ours is not None and theirs is not None
        found |= {
            f"day0_tokens_ratio{suffix}": (_tokens_ratio(ours, theirs) if pair else _UNKNOWN).to_json(),
            f"final_al_ratio{suffix}": (_final_ratio(ours, theirs) if pair else _UNKNOWN).to_json(),
        }
    peers = {name: side for name, side in data.items() if side.runs[0].learner.peer}
    fastest = max(peers.values(), key=lambda side: float(np.median(side.rates)), default=None)
    ratio = _UNKNOWN
    if ours is not None and fastest is not None:
        starts = min(len(ours.rates), len(fastest.rates))
        ratio = of_rates(ours.rates[:starts], fastest.rates[:starts])
    found["trainer_ratio_over_fastest_peer"] = ratio.to_json()
    if ours is not None:
        found["against_peers"] = {
            name: {
                "day0_tokens_ratio": _tokens_ratio(ours, side).to_json(),
                "final_al_ratio": _final_ratio(ours, side).to_json(),
                "area_ratio": bootstrap(
                    lambda a, b, marks=ours.tokens: area(marks, curve(a)) / area(marks, curve(b)),
                    *_same_starts(ours.all, side.all),
                ).to_json(),
            }
            for name, side in peers.items()
        }
    return found


def _tokens_ratio(ours: Any, theirs: Any) -> Interval:
    sides = _same_starts(ours.all, theirs.all)
    return bootstrap(lambda a, b: tokens_ratio(ours.tokens, curve(a), curve(b)), *sides)


def _final_ratio(ours: Any, theirs: Any) -> Interval:
    return bootstrap(lambda a, b: float(curve(a)[-1] / curve(b)[-1]), *_same_starts(ours.all, theirs.all))


def _same_starts(*sides: Runs) -> list[Runs]:
    """Of each side the starts that all have."""
    return [side[: min(map(len, sides))] for side in sides]


def _shift_summary(shift: Mapping[str, Any], data: Mapping[str, _Side]) -> dict[str, Any]:
    """Recovery is ``day0_tokens_ratio`` on the new domain, in tokens since the shift: a half is twice as fast."""
    found = {"min_relative_al": shift["min_relative_al"]}
    for suffix, name in (("", ONE_PASS), ("_same_cpu", EPOCHS)):
        ratio = _recovery_ratio(data[OURS], data[name]) if name in data else _UNKNOWN
        found[f"recovery_ratio{suffix}"] = ratio.to_json()
    return {"shift": found, "forgetting": shift["forgetting"]}


def _recovery_ratio(ours: _Side, theirs: _Side) -> Interval:
    shifted, returned, _ = ours.runs[0].scenario.ends
    phase = slice(shifted, returned + 1)
    tokens = [at - ours.tokens[shifted] for at in ours.tokens[phase]]
    sides = _same_starts(ours.of(domain="code"), theirs.of(domain="code"))
    return bootstrap(lambda a, b: tokens_ratio(tokens, curve(a)[phase], curve(b)[phase]), *sides)


def _sets(sets: TraceSets) -> dict[str, Any]:
    found = {}
    for name in ("held-out", "weak", "day0", "mixed", "return"):
        if not sets.path(name).exists():
            continue
        traces = sets.read(name)
        tokens = sum(trace.output.shape[0] for trace in traces)
        rounds = sum(trace.rounds.root.shape[0] for trace in traces)
        proposed = sum(trace.rounds.tokens.shape[0] for trace in traces)
        accepted = sum(sum(trace.rounds.accepted.data) for trace in traces)
        found[name] = {
            "requests": len(traces),
            "output_tokens": tokens,
            "recorded_accept_length": round(tokens / rounds, 3),
            "rejected_proposals": proposed - accepted,
        }
    return found


def _finite(number: float) -> float | None:
    return round(number, 1) if math.isfinite(number) else None


def _rounded(values: Any, digits: int = 4) -> list[float]:
    return [round(float(value), digits) for value in values]


def show(report: Mapping[str, Any], console: Console) -> None:
    """Tables for a person."""
    titles = {"day0": "Day 0: mixed traffic, from nothing", "mixed": "Mixed traffic, from a weak drafter"}
    for name, title in titles.items():
        if name not in report["scenarios"]:
            continue
        table = Table(title=title, title_justify="left", caption=report["intervals"], caption_justify="left")
        table.add_column("learner")
        columns = "final AL", "over default", "T=0 / 0.7", "area", "tokens to AL 2", "passes", "CPU s"
        for column in (*columns, "tokens/CPU s", "peak MB"):
            table.add_column(column, justify="right")
        for learner, found in report["scenarios"][name].items():
            to_2 = found["tokens_to_accept_length_2"]["value"]
            greedy, drawn = (found["accept_length_at"][f"{t:g}"][-1] for t in TEMPERATURES)
            table.add_row(
                learner,
                _text(found["final"]),
                _text(found["final_over_default"]),
                f"{greedy:.2f} / {drawn:.2f}",
                _text(found["area"]),
                "never" if to_2 is None else f"{to_2:.0f}",
                f"{found['passes']:.1f}",
                f"{found['cpu_s']:.0f}",
                f"{found['trained_tokens_per_cpu_s']:.0f}",
                f"{found['peak_rss_mb']:.0f}",
            )
        console.print(table)
    if "shift" in report:
        table = Table(title="Prose, then code, then prose again", title_justify="left")
        table.add_column("learner")
        for column in (
            "worst of 50 requests over frozen",
            "code over prose before",
            "forgetting",
            "prose after return",
        ):
            table.add_column(column, justify="right")
        for learner, found in report["shift"].items():
            names = ("min_relative_al", "code_over_prose", "forgetting", "after_return")
            table.add_row(learner, *(_text(found[name]) for name in names))
        console.print(table)
    for name, why in report.get("not_measured", {}).items():
        console.print(f"not measured: {name}: {why}")
    costs = report["costs"]
    console.print(f"drafting to depth {costs['depth']:.0f} pays from accept length {costs['break_even_al']:.2f} on")


def _text(interval: Mapping[str, float | None]) -> str:
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:.2f} ({'-' if low is None else f'{low:.2f}'} to {'-' if high is None else f'{high:.2f}'})"


def draw(report: Mapping[str, Any], out: Path) -> None:
    """``day0.png``, ``mixed.png`` and ``shift.png``, of what was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    for name in ("day0", "mixed"):
        if name not in report["scenarios"]:
            continue
        figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
        for number, (learner, found) in enumerate(report["scenarios"][name].items()):
            style = _style(number, learner)
            for one in found["accept_length_by_seed"]:
                axes[0].plot(found["tokens"], one, color=style["color"], linewidth=0.6, alpha=0.4)
            axes[0].plot(found["tokens"], found["accept_length"], label=learner, **style)
            axes[1].plot(found["tokens"], found["accept_length_at"]["0.7"], **style)
            axes[2].plot(found["tokens"], found["goodput_tokens_per_s"], **style)
        axes[0].set_ylabel("accept length on held-out texts (thin: seeds)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
        axes[1].set_ylabel("accept length at temperature 0.7")
        axes[2].set_ylabel("tokens/s at batch 1, by the engine's measured costs")
        for axis in axes:
            axis.set_xlabel("tokens of traffic")
            axis.grid(alpha=0.25)
        figure.savefig(out / f"{name}.png", dpi=100)
        plt.close(figure)
    if "shift" in report:
        _draw_shift(report, out, plt)


def _draw_shift(report: Mapping[str, Any], out: Path, plt: Any) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for number, (learner, found) in enumerate(report["scenarios"]["return"].items()):
        style = _style(number, learner)
        for axis, domain in zip(axes, DOMAINS, strict=False):
            axis.plot(found["tokens"], found["accept_length_on"][domain], label=learner, **style)
        shift = report["shift"][learner]
        at = [shift["first_request"] + i * shift["window"] for i in range(len(shift["served"]))]
        axes[2].step(at, np.asarray(shift["served"]) / np.asarray(shift["frozen"]), where="post", **style)
    for axis, domain in zip(axes, DOMAINS, strict=False):
        for end in next(iter(report["shift"].values()))["phase_ends_tokens"][:-1]:
            axis.axvline(end, color="#b03a2e", linestyle="--", linewidth=1)
        axis.set_ylabel(f"accept length on held-out {domain}")
        axis.set_xlabel("tokens of traffic (red: prose to code, and back)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    axes[2].axhline(1, color="black", linewidth=0.7)
    axes[2].set_ylabel("accept length over the drafter frozen at the shift")
    axes[2].set_xlabel("request")
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.savefig(out / "shift.png", dpi=100)
    plt.close(figure)


def _style(number: int, learner: str) -> dict[str, Any]:
    import matplotlib as mpl

    colours = [*map(mpl.colormaps["tab10"], range(10)), *map(mpl.colormaps["Dark2"], range(8))]
    return {
        "color": colours[number % len(colours)],
        "linewidth": 2.2 if learner == OURS else 1.4,
        "linestyle": "--" if "our code" in learner or "forward KL" in learner else "-",
    }
