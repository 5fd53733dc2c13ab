"""Planning and recording the traffic that learners are compared on."""

from __future__ import annotations

from pathlib import Path

import pytest
from livedraft.benchmarks.learn_traces import DOMAINS, Sizes, plan, record
from livedraft.contracts.errors import LivedraftError

from tests.serving.local.models import make_target

SIZES = Sizes(held_out=3, weak=4, day0=6, mixed=4, phases=(4, 5, 3))
PROMPTS = {domain: [f"{domain} {i}" for i in range(60)] for domain in DOMAINS}


def test_a_plan_is_a_function_of_its_seed_and_sizes() -> None:
    assert plan(SIZES, 1, PROMPTS) == plan(SIZES, 1, {name: [*reversed(p)] for name, p in PROMPTS.items()})
    assert plan(SIZES, 1, PROMPTS) != plan(SIZES, 2, PROMPTS)


def test_no_prompt_is_in_two_sets() -> None:
    asked = [ask.prompt for planned in plan(SIZES, 0, PROMPTS).values() for ask in planned.asks]
    assert len(asked) == len(set(asked)) == 6 + 4 + 6 + 4 + 12


def test_domains_come_as_each_set_says_and_temperatures_alternate_in_each() -> None:
    plans = plan(SIZES, 0, PROMPTS)
    assert [ask.domain for ask in plans["day0"].asks] == ["prose", "code"] * 3
    assert [ask.domain for ask in plans["return"].asks] == ["prose"] * 4 + ["code"] * 5 + ["prose"] * 3
    for planned in plans.values():
        for domain in DOMAINS:
            drawn = [ask.temperature for ask in planned.asks if ask.domain == domain]
            assert drawn == ([0.0, 0.7] * len(drawn))[: len(drawn)]


def test_too_few_prompts_are_named() -> None:
    with pytest.raises(LivedraftError, match="code has 5 different prompts, these sizes need 22"):
        plan(SIZES, 0, PROMPTS | {"code": [f"code {i}" for i in range(5)]})


def test_recorded_traffic_has_rejected_proposals_and_is_read_back_from_its_cache(tmp_path: Path) -> None:
    target = str(make_target(tmp_path / "target", "llama", vocab_size=4096))
    sizes = Sizes(held_out=1, weak=16, day0=4, mixed=0, phases=(1, 1, 0))
    sets = record(sizes, 0, target, tmp_path / "out")
    day0 = sets.read("day0")
    assert [trace.request_id for trace in day0] == [f"day0-{i}" for i in range(4)]
    assert [trace.domain for trace in day0] == ["prose", "code"] * 2
    assert all(0 in trace.rounds.accepted.data and trace.rounds.size.data.strip(b"\0") for trace in day0)
    assert {trace.drafters for trace in sets.read("return")} == {("weak",)}
    written = {path: path.stat().st_mtime_ns for path in sets.folder.rglob("*") if path.is_file()}
    assert record(sizes, 0, target, tmp_path / "out") == sets
    assert written == {path: path.stat().st_mtime_ns for path in sets.folder.rglob("*") if path.is_file()}
    assert record(sizes, 1, target, tmp_path / "out").folder != sets.folder
