"""The watch after a swap: does the new drafter keep its promise online?  A pure decision."""

from __future__ import annotations

from collections import deque

from livedraft.contracts.messages import Decision, EngineStatus, Record
from msgspec.structs import replace


class Watch(Record, frozen=True, kw_only=True):
    """A swap under observation."""

    candidate: str
    #: The version it replaced.
    live: str | None
    #: Accept length that the gate predicted, and its standard error as a share of it (0: not known).
    predicted: float
    predicted_error: float = 0.0
    #: The same by stratum of the traffic, "domain/greedy" or "domain/sampled", where the gate saw any.
    predicted_by_stratum: dict[str, float] = {}
    #: Accept length of the replaced version: as observed just before the swap, else as the gate predicted.
    previous: float
    #: Unix seconds.
    started_at: float
    #: The candidate's counters at the swap (it may have served before).
    tokens: int = 0
    rounds: int = 0
    requests: int = 0
    #: Rounds that the engine had served by then, with whatever drafter and depth.
    served: int = 0


class WatchRules(Record, frozen=True, kw_only=True):
    """How long to look, and what is too little."""

    rounds: int = 1000
    #: Where the engine counts them.  Rounds of one request are alike: they say less than as many of several.
    requests: int = 40
    timeout_s: float = 120.0
    #: Times as much that is looked at while no better drafter is at hand.
    longer: float = 1.0
    #: Times ``rounds`` that the engine serves, of whatever traffic, until traffic like that judged is not waited for.
    #: Once it has drafted for the ``rounds`` of other traffic, and for less of that, it is not waited for either.
    patience: int = 5
    rollback_below: float = 0.9
    #: Share of the rounds after which a drafter goes that fails by ``rollback_below`` twice over.
    early: float = 0.25


def judge(watch: Watch, status: EngineStatus, now: float, rules: WatchRules) -> Decision:
    """Keep, roll back, or wait for more rounds.

    What may be kept may be watched on: see ``exhausted``.
    Rolls back when the observed accept length is below ``rollback_below`` of both the prediction and the previous
    version's: below the prediction alone, traffic may have grown harder for any drafter; below the previous one
    alone, the gate knew.  After ``timeout_s``, or ``patience`` times the rounds of whatever traffic, it decides on what
    it has (or the first watch before a shift would hold up all that is learned from the new traffic); without a single
    round it keeps.  A drafter below ``rollback_below`` of that floor goes once ``early`` of the rounds are seen.
    Only traffic of the strata that the gate judged is counted, and the prediction is weighted by their share of it: a
    shift of the traffic is not the drafter's doing.  Evidence: ``predicted_accept_length``,
    ``predicted_error`` (its standard error as a share of it, as the gate saw it), ``previous_accept_length``,
    ``observed_accept_length``, ``relative_error`` (of the prediction), ``rounds``, ``requests`` (where counted), and
    ``seen``, the share of what it wanted that those are; ``others``, its rounds of traffic that the gate did not judge.
    """
    predicted, tokens, rounds, others = _observed(watch, status)
    requests = _requests(watch, status)
    share = rounds / max(1, rules.rounds)
    seen = share if requests is None else min(share, requests / max(1, rules.requests))
    evidence = {
        "predicted_accept_length": predicted,
        "predicted_error": watch.predicted_error,
        "previous_accept_length": watch.previous,
        "rounds": float(rounds),
        "seen": seen,
        "others": float(others),
    }
    if requests is not None:
        evidence["requests"] = float(requests)
    verdict = Decision(
        action="wait",
        reason=f"{rounds} of {rules.rounds} rounds",
        candidate=watch.candidate,
        live=watch.live,
        evidence=evidence,
        at=now,
    )
    over = seen >= 1.0 or _ended(verdict, watch, status, rules)
    floor = rules.rollback_below * min(predicted, watch.previous)
    if rounds == 0:
        reason = "it was not asked to draft for the traffic it was judged on"
        return replace(verdict, action="keep", reason=reason) if over else verdict
    observed = tokens / rounds
    if not over and not (seen >= rules.early and observed < rules.rollback_below * floor):
        return verdict
    evidence |= {"observed_accept_length": observed, "relative_error": abs(predicted - observed) / observed}
    return replace(
        verdict,
        action="rollback" if observed < floor else "keep",
        reason=f"accept length {observed:.2f} over {rounds} rounds, predicted {predicted:.2f}, "
        f"before {watch.previous:.2f}",
        evidence=evidence,
    )


def exhausted(verdict: Decision, watch: Watch, status: EngineStatus, rules: WatchRules) -> bool:
    """Whether a drafter that ``judge`` keeps has been looked at for as long as that teaches anything: ``longer``."""
    return verdict.evidence["seen"] >= rules.longer or _ended(verdict, watch, status, rules)


def _ended(verdict: Decision, watch: Watch, status: EngineStatus, rules: WatchRules) -> bool:
    """Whether it has to do with what was observed: it took too long, or the traffic moved on."""
    return (
        verdict.at >= watch.started_at + rules.timeout_s
        or status.rounds - watch.served >= rules.patience * rules.rounds
        or verdict.evidence["others"] >= max(rules.rounds, verdict.evidence["rounds"])
    )


def _observed(watch: Watch, status: EngineStatus) -> tuple[float, int, int, int]:
    """The prediction, the (tokens, rounds) since the swap that it can be compared with, and rounds of other traffic."""
    strata = status.by_stratum.get(watch.candidate, {})
    if strata and watch.predicted_by_stratum:
        judged = [
            (watch.predicted_by_stratum[s], *seen) for s, seen in strata.items() if s in watch.predicted_by_stratum
        ]
        rounds = sum(r for _, _, r in judged)
        predicted = sum(p * r for p, _, r in judged) / rounds if rounds else watch.predicted
        return predicted, sum(t for _, t, _ in judged), rounds, sum(r for _, r in strata.values()) - rounds
    tokens, rounds = status.by_drafter.get(watch.candidate, (0, 0))
    if rounds >= watch.rounds:  # else the engine started anew, and counts from zero
        tokens, rounds = tokens - watch.tokens, rounds - watch.rounds
    return watch.predicted, tokens, rounds, 0


def _requests(watch: Watch, status: EngineStatus) -> int | None:
    """Requests that it has drafted for since the swap; None where the engine does not count them."""
    requests = status.requests_by_drafter.get(watch.candidate)
    if requests is None:
        return None if not status.requests_by_drafter else 0
    return requests - watch.requests if requests >= watch.requests else requests


class Meter:
    """The recent accept length of whatever drafter an engine has, from snapshots of its counters."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._drafter = ""
        self._seen: deque[tuple[int, int]] = deque()

    def observe(self, status: EngineStatus) -> None:
        """Take a snapshot; another drafter, or an engine started anew, begins a new measurement."""
        now = status.by_drafter.get(status.drafter, (0, 0))
        if status.drafter != self._drafter or (self._seen and now[1] < self._seen[-1][1]):
            self._drafter, self._seen = status.drafter, deque()
        self._seen.append(now)
        while len(self._seen) > 2 and now[1] - self._seen[1][1] >= self._rounds:
            self._seen.popleft()

    @property
    def accept_length(self) -> float | None:
        """Over about the last ``rounds`` rounds; None before the first one."""
        if not self._seen or self._seen[-1][1] == self._seen[0][1]:
            return None
        (tokens, rounds), (then_tokens, then_rounds) = self._seen[-1], self._seen[0]
        return (tokens - then_tokens) / (rounds - then_rounds)
