"""The report on runs whose outcome is known."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from livedraft.benchmarks.learn import Run, Scenario
from livedraft.benchmarks.learn_learners import EPOCHS, ONE_PASS, OURS, Learner
from livedraft.benchmarks.learn_report import build, draw, show
from livedraft.benchmarks.learn_run import Mark
from livedraft.benchmarks.learn_score import Scores
from livedraft.benchmarks.learn_traces import Sizes, TraceSets
from livedraft.traces.codec import encode
from rich.console import Console

from tests.trainer.conftest import make_trace

SIZES = Sizes(held_out=2, weak=0, day0=0, mixed=0, phases=(50, 50, 50))
COSTS = {"depth": 4.0, "plain_round_s": 0.01, "drafting_round_s": 0.015, "break_even_al": 1.5}
DAY0 = Scenario("day0", "fresh", 10)
RETURN = Scenario("return", "fresh", 25, (2, 4, 6))


@pytest.fixture
def sets(tmp_path: Path) -> TraceSets:
    """Four held-out texts: prose and code in turn, greedy and drawn."""
    traces = [
        make_trace([1, 2], [((), (), (), 3)], number=i, temperature=t, domain=("prose", "code")[i % 2])
        for i, t in enumerate((0.0, 0.0, 0.7, 0.7))
    ]
    (tmp_path / "held-out.traces").write_bytes(msgspec.msgpack.encode([encode(trace) for trace in traces]))
    return TraceSets(tmp_path)


def write_run(
    folder: Path, scenario: Scenario, name: str, prose: list[float], code: list[float], rate: float, served: float = 1.0
) -> Run:
    """A run whose accept lengths at each mark are given; it trains ``rate`` tokens per second."""
    run = Run(scenario, Learner(name, "", peer="speculators" if name == "speculators" else ""), 0, folder, len(prose))
    folder.mkdir(parents=True)
    with (folder / "marks.jsonl").open("wb") as file:
        for i in range(len(prose)):
            mark = Mark(
                requests=scenario.window * i,
                tokens=1000 * i,
                steps=i,
                trained=int(rate * 10 * i),
                cpu_s=10.0 * i,
                wall_s=10.0 * i,
                peak_rss_mb=300.0 + i,
            )
            file.write(msgspec.json.encode(mark) + b"\n")
    windows = scenario.ends[-1] - scenario.ends[0] if scenario.ends else 0
    scores = Scores(
        held_out=[[(10 * p, 10.0), (10 * c, 10.0)] * 2 for p, c in zip(prose, code, strict=True)],
        ahead=[[(10 * served, 10.0)] * scenario.window] * windows,
        frozen=[[(10.0, 10.0)] * scenario.window] * windows,
    )
    (folder / "scores.json").write_bytes(msgspec.json.encode(scores))
    return run


def test_the_summary_says_who_learns_faster_and_what_a_shift_costs(sets: TraceSets, tmp_path: Path) -> None:
    slow = [1.0, 1.2, 1.4]
    runs = [
        write_run(tmp_path / "a", DAY0, OURS, [1.0, 2.0, 2.1], [1.0, 2.0, 2.1], 3000),
        write_run(tmp_path / "b", DAY0, ONE_PASS, slow, slow, 2000),
        write_run(tmp_path / "c", DAY0, EPOCHS, [1.0, 2.0, 2.2], [1.0, 2.0, 2.2], 2000),
        write_run(tmp_path / "d", DAY0, "speculators", slow, slow, 1000),
        write_run(
            tmp_path / "e",
            RETURN,
            OURS,
            [1.0, 1.5, 2.0, 1.9, 1.8, 2.0, 2.0],
            [1.0, 1.0, 1.0, 1.2, 1.6, 1.5, 1.5],
            3000,
            served=1.1,
        ),
        write_run(tmp_path / "f", RETURN, ONE_PASS, [1.0] * 7, [1.0, 1.1, 1.0, 1.1, 1.2, 1.5, 1.5], 2000),
    ]
    report = build(runs, sets, COSTS, SIZES)
    summary = report["summary"]
    # Ours has 1.4 after 400 tokens, one pass after 2000; epochs has 2.2, which ours never has.
    assert summary["day0_tokens_ratio"]["value"] == pytest.approx(0.2)
    assert summary["final_al_ratio"]["value"] == pytest.approx(1.5)
    assert summary["day0_tokens_ratio_same_cpu"] == {"value": None, "low": None, "high": None}
    assert summary["final_al_ratio_same_cpu"]["value"] == pytest.approx(2.1 / 2.2, abs=1e-4)
    assert summary["trainer_ratio_over_fastest_peer"]["value"] == pytest.approx(3.0)
    assert summary["against_peers"]["speculators"]["final_al_ratio"]["value"] == pytest.approx(1.5)
    assert summary["shift"]["min_relative_al"]["value"] == pytest.approx(1.1)
    assert summary["shift"]["recovery_ratio_same_cpu"]["value"] is None
    # On code, 2000 tokens after the shift one pass has come to 1.2; ours has that after 1000.
    assert summary["shift"]["recovery_ratio"]["value"] == pytest.approx(0.5)
    assert report["shift"][OURS]["code_over_prose"]["value"] == pytest.approx(1.6 / 2.0)
    assert summary["forgetting"]["value"] == pytest.approx(0.1)
    assert report["shift"][OURS]["after_return"]["value"] == pytest.approx(1.0)
    # 0.9 of 1.6 lies 0.6 of the way from 1.2, at 3000, to 1.6, at 4000; the shift was at 2000.
    assert report["shift"][OURS]["tokens_to_90_percent_after_shift"] == pytest.approx(1600)
    goodput = report["scenarios"]["day0"][OURS]["goodput_tokens_per_s"]
    assert goodput == pytest.approx([100, 133.3, 140], abs=0.1)
    msgspec.json.encode(report)
    said = Console(file=io.StringIO(), width=200)
    show(report, said)
    assert isinstance(said.file, io.StringIO)
    assert "never" in said.file.getvalue()
    draw(report, tmp_path)
    assert (tmp_path / "day0.png").stat().st_size > 10_000
    assert (tmp_path / "shift.png").stat().st_size > 10_000


def test_what_was_not_run_is_null_in_the_summary(sets: TraceSets, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", DAY0, OURS, [1.0, 2.0, 2.1], [1.0, 2.0, 2.1], 3000)]
    summary = build(runs, sets, COSTS, SIZES)["summary"]
    assert summary["day0_tokens_ratio"]["value"] is None
    assert summary["trainer_ratio_over_fastest_peer"]["value"] is None
    assert summary["against_peers"] == {}


def test_starts_are_told_apart_and_a_slow_learner_is_compared_on_those_it_has(sets: TraceSets, tmp_path: Path) -> None:
    rising = [1.0, 1.0, 2.0, 2.0]
    runs = [
        write_run(tmp_path / "a", DAY0, OURS, [1.0, 2.0], [1.0, 2.0], 3000),
        write_run(tmp_path / "b", DAY0, OURS, [1.0, 3.0], [1.0, 3.0], 3000),
        write_run(tmp_path / "c", DAY0, "speculators", [1.0, 1.0], [1.0, 1.0], 1000),
        write_run(tmp_path / "d", RETURN, OURS, [*rising, 1.8, 2.0, 2.0], [1.0] * 7, 3000, served=1.2),
        write_run(tmp_path / "e", RETURN, OURS, [*rising, 2.2, 2.0, 2.0], [1.0] * 7, 3000, served=1.0),
    ]
    report = build(runs, sets, COSTS, SIZES)
    assert report["scenarios"]["day0"][OURS]["seeds"] == 2
    assert report["summary"]["against_peers"]["speculators"]["final_al_ratio"]["value"] == pytest.approx(2.0)
    assert report["shift"][OURS]["forgetting_by_seed"] == pytest.approx([0.1, -0.1])
    assert report["shift"][OURS]["min_relative_al_by_seed"] == pytest.approx([1.2, 1.0])
    assert report["shift"][OURS]["min_relative_al"]["value"] == pytest.approx(1.1)
    assert report["shift"][OURS]["served"] == pytest.approx([1.1] * 4)
