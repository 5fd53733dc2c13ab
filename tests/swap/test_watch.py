from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.messages import EngineStatus
from livedraft.swap.watch import Meter, Watch, WatchRules, judge
from msgspec.structs import replace

from . import drafts
from .fakes import FakeEngine

RULES = WatchRules(rounds=400, requests=40, timeout_s=120.0, rollback_below=0.9)
WATCH = Watch(candidate="2", live="1", predicted=3.0, previous=2.5, started_at=100.0)


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    drafts.write(tmp_path / "a")
    return FakeEngine(tmp_path / "a", "2")


def test_it_waits_for_its_rounds(engine: FakeEngine) -> None:
    engine.serve(399, 3.0)
    decision = judge(WATCH, engine.status(), 101.0, RULES)
    assert decision.action == "wait"
    assert decision.evidence["rounds"] == 399


@pytest.mark.parametrize(
    ("observed", "action"),
    [
        (3.2, "keep"),
        (2.75, "keep"),  # within the prediction's share
        (2.4, "keep"),  # below the prediction, about the previous one: harder traffic
        (2.2, "rollback"),
        (1.0, "rollback"),
    ],
)
def test_it_compares_with_the_promise_and_the_past(engine: FakeEngine, observed: float, action: str) -> None:
    engine.serve(400, observed)
    decision = judge(WATCH, engine.status(), 101.0, RULES)
    assert decision.action == action
    assert (decision.candidate, decision.live, decision.at) == ("2", "1", 101.0)
    assert decision.evidence["observed_accept_length"] == pytest.approx(observed)
    assert decision.evidence["relative_error"] == pytest.approx(abs(3.0 - observed) / observed)


def test_rounds_of_too_few_requests_do_not_decide(engine: FakeEngine) -> None:
    watch = replace(WATCH, requests=3)  # it had served before
    engine.serve(5000, 2.2)
    engine.requests["2"] = 42
    assert judge(replace(watch, served=5000), engine.status(), 101.0, RULES).action == "wait"
    engine.requests["2"] = 43
    decision = judge(replace(watch, served=5000), engine.status(), 101.0, RULES)
    assert (decision.action, decision.evidence["requests"]) == ("rollback", 40)


def test_where_requests_are_counted_one_without_any_waits(engine: FakeEngine) -> None:
    engine.serve(400, 3.0)
    engine.requests["1"] = 100
    assert judge(WATCH, engine.status(), 101.0, RULES).action == "wait"


def test_a_drafter_that_fails_by_far_goes_early(engine: FakeEngine) -> None:
    engine.serve(99, 1.5)
    assert judge(WATCH, engine.status(), 101.0, RULES).action == "wait"
    engine.serve(1, 1.5)
    assert judge(WATCH, engine.status(), 101.0, RULES).action == "rollback"


def test_a_drafter_that_fails_by_little_has_its_time(engine: FakeEngine) -> None:
    engine.serve(399, 2.2)  # below 0.9 x 2.5, not below 0.81 x 2.5
    assert judge(WATCH, engine.status(), 101.0, RULES).action == "wait"


@given(
    st.integers(1, 4000),
    st.floats(1.0, 5.0),
    st.floats(1.0, 5.0),
    st.floats(1.0, 5.0),
    st.integers(0, 200),
    st.floats(0, 200),
)
def test_it_goes_back_only_from_what_is_worse_than_promised_and_than_before(
    rounds: int, observed: float, predicted: float, previous: float, requests: int, seconds: float
) -> None:
    watch = replace(WATCH, predicted=predicted, previous=previous)
    status = EngineStatus(
        engine="e", target="t", target_revision="r", tokenizer_hash="h", context_length=1, drafter="2",
        drafter_checksum="c", running=0, waiting=0, output_tokens=0, rounds=rounds,
        by_drafter={"2": (round(rounds * observed), rounds)}, requests_by_drafter={"2": requests},
    )  # fmt: skip
    decision = judge(watch, status, WATCH.started_at + seconds, RULES)
    if decision.action == "rollback":
        assert decision.evidence["observed_accept_length"] < 0.9 * min(predicted, previous)
    if decision.action == "wait":
        assert rounds < RULES.rounds or requests < RULES.requests
        assert seconds < RULES.timeout_s


def test_a_small_promise_kept_is_no_reason_to_go_back(engine: FakeEngine) -> None:
    engine.serve(400, 1.5)
    watch = Watch(candidate="2", live="1", predicted=1.5, previous=2.5, started_at=100.0)
    assert judge(watch, engine.status(), 101.0, RULES).action == "keep"


def test_after_its_time_it_decides_on_what_it_has(engine: FakeEngine) -> None:
    engine.serve(60, 1.0)
    assert judge(WATCH, engine.status(), 219.9, RULES).action == "wait"
    assert judge(WATCH, engine.status(), 220.0, RULES).action == "rollback"


def test_once_the_traffic_has_moved_on_it_decides_on_what_it_has(engine: FakeEngine) -> None:
    engine.serve_undrafted(5000)  # before the swap
    watch = replace(WATCH, served=engine.status().rounds)
    engine.serve(60, 1.0)
    engine.serve_undrafted(1939)
    assert judge(watch, engine.status(), 101.0, RULES).action == "wait"
    engine.serve_undrafted(1)
    assert judge(watch, engine.status(), 101.0, RULES).action == "rollback"


def test_other_traffic_that_was_drafted_for_shows_sooner_that_it_has_moved_on(engine: FakeEngine) -> None:
    watch = replace(WATCH, predicted_by_stratum={"a/greedy": 3.0})
    seen = {"a/greedy": (210, 100), "b/greedy": (399, 399)}
    assert judge(watch, replace(engine.status(), by_stratum={"2": seen}), 101.0, RULES).action == "wait"
    decision = judge(watch, replace(engine.status(), by_stratum={"2": seen | {"b/greedy": (400, 400)}}), 101.0, RULES)
    assert (decision.action, decision.evidence["seen"]) == ("rollback", 0.25)
    mixed = {"a/greedy": (690, 300), "b/greedy": (200, 200), "c/greedy": (90, 90)}
    assert judge(watch, replace(engine.status(), by_stratum={"2": mixed}), 101.0, RULES).action == "wait"


def test_without_traffic_it_keeps(engine: FakeEngine) -> None:
    decision = judge(WATCH, engine.status(), 300.0, RULES)
    assert decision.action == "keep"
    assert "observed_accept_length" not in decision.evidence


def test_what_was_served_before_the_swap_does_not_count(engine: FakeEngine) -> None:
    engine.serve(1000, 1.0)
    watch = Watch(candidate="2", live="1", predicted=3.0, previous=2.5, started_at=100.0, tokens=1000, rounds=1000)
    assert judge(watch, engine.status(), 101.0, RULES).action == "wait"
    engine.serve(400, 3.0)
    decision = judge(watch, engine.status(), 101.0, RULES)
    assert decision.evidence["observed_accept_length"] == pytest.approx(3.0)


def test_an_engine_that_started_anew_counts_from_zero(engine: FakeEngine) -> None:
    watch = Watch(candidate="2", live="1", predicted=3.0, previous=2.5, started_at=100.0, tokens=1000, rounds=1000)
    engine.serve(400, 3.0)
    assert judge(watch, engine.status(), 101.0, RULES).evidence["observed_accept_length"] == pytest.approx(3.0)


def test_the_meter_shows_the_recent_past(engine: FakeEngine) -> None:
    meter = Meter(rounds=100)
    meter.observe(engine.status())
    assert meter.accept_length is None
    for accept_length in [1.0] * 10 + [3.0] * 4:
        engine.serve(50, accept_length)
        meter.observe(engine.status())
    assert meter.accept_length == pytest.approx(3.0)


def test_the_meter_starts_anew_with_another_drafter_and_another_engine(engine: FakeEngine, tmp_path: Path) -> None:
    meter = Meter(rounds=100)
    meter.observe(engine.status())
    engine.serve(50, 1.0)
    meter.observe(engine.status())
    engine.drafter = "3"
    meter.observe(engine.status())
    assert meter.accept_length is None
    engine.serve(50, 2.0)
    meter.observe(engine.status())
    assert meter.accept_length == pytest.approx(2.0)
    engine.restart(tmp_path / "a", "3")
    engine.serve(10, 4.0)
    meter.observe(engine.status())
    assert meter.accept_length is None


def test_the_prediction_is_weighted_by_the_strata_that_were_observed(engine: FakeEngine) -> None:
    seen = replace(engine.status(), by_stratum={"2": {"a/greedy": (400, 100), "a/sampled": (600, 300)}})
    verdict = judge(replace(WATCH, predicted_by_stratum={"a/greedy": 4.0, "a/sampled": 2.0}), seen, 101.0, RULES)
    assert verdict.evidence["predicted_accept_length"] == 2.5
    assert verdict.evidence["relative_error"] == 0.0


def test_a_shift_of_the_traffic_is_not_held_against_the_drafter(engine: FakeEngine) -> None:
    watch = replace(WATCH, predicted_by_stratum={"a/greedy": 4.0})
    shifted = replace(engine.status(), by_stratum={"2": {"a/greedy": (40, 10), "b/greedy": (390, 390)}})
    assert judge(watch, shifted, 101.0, RULES).action == "wait"
    decision = judge(watch, shifted, 100.0 + RULES.timeout_s, RULES)
    assert (decision.action, decision.evidence["observed_accept_length"]) == ("keep", 4.0)
    elsewhere = replace(engine.status(), by_stratum={"2": {"b/greedy": (900, 900)}})
    assert judge(watch, elsewhere, 100.0 + RULES.timeout_s, RULES).action == "keep"
