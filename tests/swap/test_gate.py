from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.messages import EngineStatus, ReplayScore
from livedraft.swap.gate import GateRules, RoundCost, judge, measured
from msgspec.structs import replace


def scores(accept_lengths: list[float], tokens: float = 60.0) -> list[ReplayScore]:
    return [
        ReplayScore(trace_id=f"t{n}", domain="prose", temperature=0.0, tokens=tokens, rounds=tokens / al)
        for n, al in enumerate(accept_lengths)
    ]


def noisy(mean: float, n: int = 48, seed: int = 0, spread: float = 0.4) -> list[float]:
    return list(np.maximum(1.0, np.random.default_rng(seed).normal(mean, spread, n)))


def test_a_better_candidate_is_promoted_with_its_evidence() -> None:
    live = noisy(2.0)
    decision = judge(scores([al + 0.2 for al in live]), scores(live), GateRules())
    assert decision.action == "promote"
    assert decision.evidence["predicted_accept_length"] == pytest.approx(2.2, abs=0.1)
    assert decision.evidence["live_accept_length"] == pytest.approx(2.0, abs=0.1)
    assert 1.0 < decision.evidence["lower"] < decision.evidence["ratio"] < decision.evidence["upper"]
    assert decision.evidence["traces"] == 48
    assert decision.evidence["tokens"] == 48 * 60


def test_pairing_sees_a_gain_far_below_the_spread_of_the_traces() -> None:
    live = noisy(2.5, spread=0.6)
    better = [al * (1.02 + 0.01 * (-1) ** n) for n, al in enumerate(live)]
    assert judge(scores(better), scores(live), GateRules()).action == "promote"


@pytest.mark.parametrize("seed", range(5))
def test_noise_around_the_same_drafter_is_not_proof(seed: int) -> None:
    live = noisy(2.5)
    other = [a + d for a, d in zip(live, np.random.default_rng(seed).normal(0, 0.2, 48), strict=True)]
    balanced = [a - np.mean(np.subtract(other, live)) for a in other]
    decision = judge(scores(balanced), scores(live), GateRules())
    assert decision.action == "reject"
    assert "not proven better" in decision.reason


def test_the_same_drafter_again_is_rejected() -> None:
    live = scores(noisy(2.5))
    assert judge(live, live, GateRules()).action == "reject"


def test_too_few_traces_wait() -> None:
    decision = judge(scores([3.0] * 7), scores([2.0] * 7), GateRules(min_traces=8))
    assert decision.action == "wait"
    assert decision.reason == "7 traces, 8 needed"


def test_unpaired_and_empty_scores_do_not_count() -> None:
    live = scores([2.0] * 12)
    candidate = scores([3.0] * 8)
    empty = ReplayScore(trace_id="t9", domain="prose", temperature=0.0, tokens=0.0, rounds=0.0)
    assert judge([*candidate, empty], live, GateRules()).evidence["traces"] == 8


def test_traces_weigh_by_their_tokens() -> None:
    long, short = scores([2.0], tokens=900.0), scores([1.0, 4.0, 4.0], tokens=10.0)[1:]
    decision = judge([*long, *short], [*long, *short], GateRules(min_traces=3))
    assert decision.evidence["predicted_accept_length"] == pytest.approx(920 / 455)


def test_traces_are_weighted_to_the_traffic_of_today() -> None:
    """The candidate is worse on sixty traces of yesterday's domain, and better on twelve of today's."""
    yesterday = [replace(s, trace_id=f"old{s.trace_id}") for s in scores([3.0] * 60)]
    today = [replace(s, domain="code") for s in scores([1.2] * 12)]
    candidate = [replace(s, rounds=s.rounds * 1.1) for s in yesterday] + [
        replace(s, rounds=s.rounds / 1.3) for s in today
    ]
    live = [*yesterday, *today]
    assert judge(candidate, live, GateRules()).action == "reject"
    decision = judge(candidate, live, GateRules(), mix={"code/greedy": 900.0})
    assert decision.action == "promote"
    assert decision.evidence["ratio"] == pytest.approx(1.3)
    assert decision.evidence["predicted_accept_length"] == pytest.approx(1.2 * 1.3)
    assert decision.evidence["traces"] == 12
    waits = judge(candidate, live, GateRules(min_traces=13), mix={"code/greedy": 900.0})
    assert (waits.action, waits.evidence) == ("wait", {"traces": 12.0})


def test_a_promise_that_is_not_known_well_enough_waits_while_traces_come() -> None:
    live, better = noisy(2.5, n=12, spread=0.7), noisy(3.5, n=12, spread=0.9)
    decision = judge(scores(better), scores(live), GateRules())
    assert decision.action == "wait"
    assert decision.evidence["predicted_error"] > 0.05
    assert judge(scores(better), scores(live), GateRules(max_error=0.2)).action == "promote"
    assert judge(scores(better), scores(live), GateRules(enough_traces=12)).action == "promote"


def test_a_mix_weighs_strata_by_their_share_of_it() -> None:
    both = scores([2.0] * 10) + [replace(s, trace_id=f"c{s.trace_id}", domain="code") for s in scores([4.0] * 30)]
    mixed = judge(both, both, GateRules(), mix={"prose/greedy": 1.0, "code/greedy": 1.0, "never seen/greedy": 9.0})
    # as many tokens of either: 2 / (1/2 + 1/4)
    assert mixed.evidence["predicted_accept_length"] == pytest.approx(2 / 0.75)


def test_a_mix_that_shares_nothing_with_the_evidence_is_no_reason_to_wait() -> None:
    live = scores(noisy(2.0))
    assert judge(scores(noisy(2.5)), live, GateRules(), mix={"code/greedy": 1.0}) == judge(
        scores(noisy(2.5)), live, GateRules()
    )


def test_the_error_of_the_prediction_is_that_of_a_mean_over_traces() -> None:
    """Repeated 300 times, predictions scatter as the gate says of one."""
    lengths = [noisy(2.5, n=48, seed=seed, spread=0.5) for seed in range(300)]
    found = [judge(scores(line), scores(line), GateRules(bootstrap=200)).evidence for line in lengths]
    scatter = float(np.std([e["predicted_accept_length"] for e in found])) / 2.5
    assert float(np.mean([e["predicted_error"] for e in found])) == pytest.approx(scatter, rel=0.15)


def test_the_baseline_drafter_is_a_floor() -> None:
    live, better = [2.0] * 12, [2.2] * 12
    assert judge(scores(better), scores(live), GateRules(), baseline=scores([2.1] * 12)).action == "promote"
    decision = judge(scores(better), scores(live), GateRules(), baseline=scores([2.5] * 12))
    assert decision.action == "reject"
    assert "baseline" in decision.reason
    assert decision.evidence["baseline_accept_length"] == pytest.approx(2.5)


def test_below_break_even_only_where_the_engine_can_stop_speculating() -> None:
    candidate, live = scores([1.5] * 12), scores([1.2] * 12)
    cost = RoundCost(depth=4, draft=0.1, verify=1.5)  # breaks even at 1.9
    assert judge(candidate, live, GateRules(cost=cost, engine_can_stop=True)).action == "promote"
    decision = judge(candidate, live, GateRules(cost=cost, engine_can_stop=False))
    assert decision.action == "reject"
    assert "below not speculating" in decision.reason
    assert decision.evidence["goodput_over_plain"] == pytest.approx(1.5 / 1.9)
    above = judge(scores([2.0] * 12), live, GateRules(cost=cost, engine_can_stop=False))
    assert above.action == "promote"


def test_costs_that_an_engine_measured_replace_the_assumed() -> None:
    assumed = RoundCost(depth=4, draft=0.1, verify=1.5)
    status = EngineStatus(
        engine="e", target="t", target_revision="r", tokenizer_hash="h", context_length=1, drafter="", running=0,
        drafter_checksum="", waiting=0, output_tokens=0, rounds=0,
    )  # fmt: skip
    assert measured(status, assumed) == assumed
    partly = replace(status, pass_s={1: 0.004, 3: 0.005}, draft_s={2: 0.001})
    assert measured(partly, assumed) == assumed
    whole = replace(status, pass_s={1: 0.004, 5: 0.008}, draft_s={4: 0.0032})
    found = measured(whole, assumed)
    assert found.verify == 2.0
    assert found.draft == pytest.approx(0.2)
    # breaks even at 2.8, no longer at 1.9
    rules = GateRules(cost=found, engine_can_stop=False)
    decision = judge(scores([2.5] * 12), scores([2.2] * 12), rules)
    assert decision.action == "reject"
    assert decision.evidence["break_even"] == pytest.approx(2.8)


lengths = st.lists(st.floats(1.0, 5.0), min_size=8, max_size=30)


@given(lengths, st.floats(1.01, 2.0))
def test_uniformly_better_is_promoted_and_its_mirror_rejected(live: list[float], gain: float) -> None:
    better = [al * gain for al in live]
    rules = GateRules(bootstrap=50, max_error=1.0)
    promoted = judge(scores(better), scores(live), rules)
    assert promoted.action == "promote"
    assert promoted.evidence["ratio"] == pytest.approx(gain)
    assert judge(scores(live), scores(better), rules).action == "reject"


@given(lengths, lengths)
def test_the_verdict_is_a_function_of_its_evidence(candidate: list[float], live: list[float]) -> None:
    shared = min(len(candidate), len(live))
    rules = GateRules(bootstrap=50, max_error=1.0)
    first = judge(scores(candidate[:shared]), scores(live[:shared]), rules)
    assert first == judge(scores(candidate[:shared]), scores(live[:shared]), rules)
    assert first.evidence["lower"] <= first.evidence["upper"]
    assert (first.action == "promote") == (first.evidence["lower"] > 1.0)


def test_promotions_of_an_equal_drafter_are_as_rare_as_the_confidence_says() -> None:
    """Over 200 gates between two equally good drafters, about 2.5 % may pass; 20 would be 10 %."""
    rng = np.random.default_rng(3)
    rules = GateRules(bootstrap=200)
    passed = 0
    for _ in range(200):
        live, other = rng.normal(2.5, 0.3, (2, 48))
        passed += judge(scores(list(other)), scores(list(live)), rules).action == "promote"
    assert passed < 20
