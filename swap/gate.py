"""The gate: does a candidate serve held-out traffic faster than the drafter in service?  A pure decision.

Expected goodput of a drafter over traces is ``tokens / (rounds * cost of a round)``, in tokens per plain target
pass.  Both drafters are replayed on the same traces, so their difference is paired: the gate resamples traces
(Efron 1979, percentile bootstrap) and promotes when the lower end of the interval of ``candidate / live`` lies
above one.  The percentile interval is somewhat narrow for fewer than about 20 traces.

Held-out traces reach further back than the traffic of today.  Where the mix of today is known, traces are weighted
to it by stratum (domain, and greedy or sampled): after a shift those of the new traffic decide, however few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from livedraft.contracts.messages import Decision, EngineStatus, Record, ReplayScore
from msgspec.structs import replace


class RoundCost(Record, frozen=True, kw_only=True):
    """What a speculating round costs, in plain one-token passes of the target.

    The defaults are those of float32 on a CPU, where a pass over five rows costs about 1.5 of a pass over one; on
    a GPU with idle compute ``verify`` is near 1.  What an engine measured replaces them: see ``measured``.
    """

    depth: int = 4
    #: One drafting step.
    draft: float = 0.1
    #: One verification of ``depth + 1`` tokens.
    verify: float = 1.5

    @property
    def total(self) -> float:
        """Plain passes per round: the accept length at which speculation breaks even."""
        return self.verify + self.depth * self.draft


def measured(status: EngineStatus, otherwise: RoundCost) -> RoundCost:
    """The costs that an engine measured at ``otherwise.depth``; each that it has not is ``otherwise``'s."""
    plain = status.pass_s.get(1, 0.0)
    if plain <= 0:
        return otherwise
    verify = status.pass_s.get(otherwise.depth + 1, 0.0) / plain
    draft = status.draft_s.get(otherwise.depth, 0.0) / plain / max(1, otherwise.depth)
    return replace(otherwise, verify=verify or otherwise.verify, draft=draft or otherwise.draft)


class GateRules(Record, frozen=True, kw_only=True):
    """How much evidence a promotion needs, and the floors under it."""

    min_traces: int = 8
    #: It waits for more traces while the prediction's standard error, as a share of it, is above ``max_error``, but not
    #: once it has ``enough_traces``.
    max_error: float = 0.05
    enough_traces: int = 64
    bootstrap: int = 1000
    #: Two-sided; promotion asks for the lower end.
    confidence: float = 0.95
    cost: RoundCost = RoundCost()
    #: Whether the engine itself stops speculating where that is faster.  If it does, a drafter below break-even
    #: costs nothing and may replace a worse one on its way up (the first drafters of a lineage are all below).  If
    #: not, nothing below break-even is promoted.
    engine_can_stop: bool = True
    seed: int = 0


def judge(
    candidate: Sequence[ReplayScore],
    live: Sequence[ReplayScore],
    rules: GateRules,
    *,
    baseline: Sequence[ReplayScore] | None = None,
    mix: Mapping[str, float] | None = None,
) -> Decision:
    """Promote, reject, or wait for more traces; scores are paired by ``trace_id``, the unpaired ignored.

    ``baseline``: scores of the frozen drafter that serving began with, which a candidate must not fall below.
    ``mix``: today's tokens by stratum ("domain/greedy", "domain/sampled"); traces of others weigh nothing.
    Evidence: ``predicted_accept_length`` and ``live_accept_length`` over all traces, ``predicted_error`` (standard
    error of the first, as a share of it), ``ratio`` of goodputs with its interval ``lower`` .. ``upper``,
    ``goodput_over_plain`` (1.0: as fast as not speculating), ``break_even`` (the accept length where it is 1.0),
    ``traces`` (that weigh anything), ``tokens``; ``predicted/domain/greedy`` and ``predicted/domain/sampled`` by
    stratum of the traffic.
    """
    drafters = [candidate, live] if baseline is None else [candidate, live, baseline]
    tokens, rounds, strata = _pair(drafters)
    weights = _weights(tokens[0], strata, mix)
    tokens, rounds = (table[:, weights > 0] * weights[weights > 0] for table in (tokens, rounds))
    if tokens.shape[1] < rules.min_traces:
        counted = {"traces": float(tokens.shape[1])}
        return Decision(action="wait", reason=f"{tokens.shape[1]} traces, {rules.min_traces} needed", evidence=counted)

    accept = tokens.sum(axis=1) / rounds.sum(axis=1)
    goodput = accept / rules.cost.total
    drawn = _resampled(tokens[:2], rounds[:2], rules)
    tail = (1.0 - rules.confidence) / 2.0
    lower, upper = (float(bound) for bound in np.quantile(drawn[0] / drawn[1], [tail, 1.0 - tail]))
    evidence = {
        "predicted_accept_length": accept[0],
        "predicted_error": drawn[0].std() / accept[0],
        "live_accept_length": accept[1],
        "ratio": goodput[0] / goodput[1],
        "lower": lower,
        "upper": upper,
        "goodput_over_plain": goodput[0],
        "break_even": rules.cost.total,
        "traces": tokens.shape[1],
        "tokens": tokens[0].sum(),
    }
    if baseline is not None:
        evidence["baseline_accept_length"] = accept[2]
    evidence |= _by_stratum(candidate)
    verdict = Decision(
        action="reject",
        reason=f"not proven better: goodput {evidence['ratio']:.3f} of live's, maybe {lower:.3f}",
        evidence={name: float(value) for name, value in evidence.items()},
    )
    if evidence["predicted_error"] > rules.max_error and len(strata) < rules.enough_traces:
        reason = f"predicted to {evidence['predicted_error']:.1%} by {len(strata)} traces, {rules.max_error:.1%} wanted"
        return replace(verdict, action="wait", reason=reason)
    if lower <= 1.0:
        return verdict
    if baseline is not None and accept[0] < accept[2]:
        return replace(verdict, reason=f"below the baseline drafter: accept length {accept[0]:.2f} < {accept[2]:.2f}")
    if not rules.engine_can_stop and goodput[0] < 1.0:
        reason = f"below not speculating: accept length {accept[0]:.2f} < {rules.cost.total:.2f}"
        return replace(verdict, reason=reason)
    reason = f"goodput {evidence['ratio']:.3f} of live's, at least {lower:.3f}"
    return replace(verdict, action="promote", reason=reason)


def stratum(domain: str, temperature: float) -> str:
    """Traffic whose acceptance is alike: "domain/greedy" or "domain/sampled", as the engine counts it."""
    return f"{domain}/{'sampled' if temperature > 0 else 'greedy'}"


def _by_stratum(scores: Sequence[ReplayScore]) -> dict[str, float]:
    """``predicted/stratum``: accept length over the traces of each stratum."""
    strata: dict[str, tuple[float, float]] = {}
    for score in scores:
        name = f"predicted/{stratum(score.domain, score.temperature)}"
        tokens, rounds = strata.get(name, (0.0, 0.0))
        strata[name] = (tokens + score.tokens, rounds + score.rounds)
    return {name: tokens / rounds for name, (tokens, rounds) in strata.items() if rounds > 0}


def _pair(drafters: Sequence[Sequence[ReplayScore]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Tokens and rounds f8[drafters, traces] of the traces that every drafter has a usable score for; their strata."""
    by_trace = [{s.trace_id: s for s in scores if s.tokens > 0 and s.rounds > 0} for scores in drafters]
    shared = [trace for trace in by_trace[0] if all(trace in scores for scores in by_trace)]
    tokens = np.array([[scores[t].tokens for t in shared] for scores in by_trace], float)
    rounds = np.array([[scores[t].rounds for t in shared] for scores in by_trace], float)
    return tokens, rounds, [stratum(by_trace[0][t].domain, by_trace[0][t].temperature) for t in shared]


def _weights(tokens: np.ndarray, strata: Sequence[str], mix: Mapping[str, float] | None) -> np.ndarray:
    """f8[traces]: what makes each stratum's share of ``tokens`` its share of ``mix``; ones where they share nothing."""
    names = np.array(strata, dtype=object)
    held = {name: float(tokens[names == name].sum()) for name in set(strata)}
    shared = {name: share for name, share in (mix or {}).items() if share > 0 and name in held}
    if not shared:
        return np.ones(len(strata))
    scale = sum(held[name] for name in shared) / sum(shared.values())
    return np.array([shared.get(name, 0.0) * scale / held[name] for name in strata])


def _resampled(tokens: np.ndarray, rounds: np.ndarray, rules: GateRules) -> np.ndarray:
    """f8[drafters, resamples]: accept lengths over resampled traces (Efron 1979), the same ones for each drafter."""
    traces = tokens.shape[1]
    drawn = np.random.default_rng(rules.seed).integers(traces, size=(rules.bootstrap, traces))
    return np.asarray(tokens[:, drawn].sum(axis=2) / rounds[:, drawn].sum(axis=2))
