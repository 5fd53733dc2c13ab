"""The swap controller: candidate in, decision out.

    controller = Controller(swapper, evidence, replay, settings.swap, rules)
    controller.run(stop)                 # until the threading.Event ``stop`` is set

Killed at any point and started again, it finds one version live: the one the engine drafts with.
"""

from __future__ import annotations

import logging
import math
import threading
from pathlib import Path

from livedraft.contracts import checkpoint, settings
from livedraft.contracts.errors import DrafterRejected, LivedraftError, SwapFailed
from livedraft.contracts.messages import Decision, DrafterVersion, EngineStatus, Manifest, ReplayScore, Trace
from livedraft.contracts.ports import Replay
from livedraft.swap import gate, watch
from livedraft.swap.drift import DriftByDomain
from livedraft.swap.evidence import Evidence, mix
from livedraft.swap.swapper import Swapper
from msgspec.structs import replace

log = logging.getLogger(__name__)

#: Alias of the latest candidate whose draft vocabulary was chosen anew: the trainer, which goes on with the live one's
#: until then, moves ``candidate`` every few seconds.
REFRESHED = "refreshed"
#: Seconds between two looks at it: it moves by hand, and an idle turn should ask the registry one thing.
LOOK_S = 10.0


class Controller:
    """Gate, swap, watch, keep or roll back; one turn is ``tick``.

    ``baseline``: folder of the frozen drafter that a candidate must not fall below.
    """

    def __init__(
        self,
        swapper: Swapper,
        evidence: Evidence,
        replay: Replay,
        settings: settings.Swap,
        rules: gate.GateRules,
        *,
        baseline: Path | None = None,
    ) -> None:
        self._swapper = swapper
        self._journal = swapper.journal
        self._evidence = evidence
        self._replay = replay
        self._settings = settings
        self._rules = rules
        self._watch_rules = watch.WatchRules(
            rounds=settings.watch_rounds,
            requests=settings.watch_requests,
            longer=settings.watch_longer,
            timeout_s=settings.watch_timeout_s,
            rollback_below=settings.rollback_below,
        )
        self._baseline = baseline
        self._meter = watch.Meter(settings.watch_rounds)
        self._drift = DriftByDomain()
        #: Candidate's folder -> the traces that did not suffice to decide on it.
        self._undecided: dict[str, tuple[str, ...]] = {}
        self._looked_at = -math.inf
        self._complaint = ""

    def run(self, stop: threading.Event) -> None:
        """Take turns until ``stop`` is set; a neighbour's fault is logged once and outlived."""
        while not stop.is_set():
            try:
                self.tick(stop)
                self._complaint = ""
            except LivedraftError as error:
                if str(error) != self._complaint:
                    log.warning("%s: %s", type(error).__name__, error)
                self._complaint = str(error)
            stop.wait(self._settings.poll_s)

    def tick(self, stop: threading.Event) -> Decision | None:
        """One turn, and at most one decision, which it returns."""
        fresh = self._evidence.refresh(stop)
        with self._journal.alone():
            status = self._swapper.settle()
            self._meter.observe(status)
            self._drift.observe(fresh, self._journal.predictions())
            decision = self._watch(status)  # needs no registry: a bad drafter goes while the registry is down
            live = self._swapper.inform(self._swapper.settle() if decision else status)
            if not decision and live and self._open_to_others(status) and not stop.is_set():
                decision = self._consider(live, status, stop)
                if decision:
                    self._swapper.inform(self._swapper.settle())
        if decision and decision.action == "promote":
            self._drift.domains.clear()  # the new drafter has learned from what drifted
        if decision:
            log.info("%s %s: %s", decision.action, decision.candidate, decision.reason)
        return decision

    def _watch(self, status: EngineStatus) -> Decision | None:
        """Close the watch, if one is open and has seen all that it may."""
        if (watched := self._journal.watch) is None:
            return None
        verdict = self._verdict(watched, status)
        if status.drafter != watched.candidate:
            reason = f"the engine went back to {status.drafter!r} by itself"
            verdict = replace(verdict, action="rollback", reason=reason)
        elif verdict.action == "wait":
            return None
        elif verdict.action == "rollback":
            try:
                return self._swapper.back(verdict)
            except DrafterRejected as error:
                verdict = replace(verdict, action="keep", reason=f"cannot go back to {watched.live}: {error}")
        elif not watch.exhausted(verdict, watched, status, self._watch_rules):
            return None
        self._journal.append(verdict)
        return verdict

    def _open_to_others(self, status: EngineStatus) -> bool:
        """Whether no drafter is being watched, or one that has shown enough to be kept."""
        watched = self._journal.watch
        return not watched or self._verdict(watched, status).action == "keep"

    def _verdict(self, watched: watch.Watch, status: EngineStatus) -> Decision:
        return watch.judge(watched, status, self._swapper.clock(), self._watch_rules)

    def _keep_watched(self) -> None:
        """Write down what the watch, if one is open, has seen by now: its drafter goes."""
        if watched := self._journal.watch:
            verdict = self._verdict(watched, self._swapper.engine.status())
            self._journal.append(replace(verdict, action="keep"))

    def _consider(self, live: DrafterVersion, status: EngineStatus, stop: threading.Event) -> Decision | None:
        """Judge the new candidates, if there are any, and swap to the first that is better."""
        aliases = ["candidate"]
        if (now := self._swapper.clock()) - self._looked_at >= LOOK_S:
            aliases, self._looked_at = [REFRESHED, "candidate"], now
        for alias in aliases:
            candidate = self._swapper.registry.resolve(alias)
            if candidate is None or candidate.checksum == live.checksum or self._journal.judged(candidate.version):
                continue
            if decision := self._decide(candidate, live, status, stop):
                return decision
        return None

    def _decide(
        self, candidate: DrafterVersion, live: DrafterVersion, status: EngineStatus, stop: threading.Event
    ) -> Decision | None:
        """The decision on one candidate, carried out; None while it has to wait."""
        live_folder, config, lived = self._swapper.fetch(live, status)
        verdict = Decision(action="reject", reason="", candidate=candidate.version, live=live.version)
        try:
            folder, _, manifest = self._swapper.fetch(candidate, status, like=config)
            _require_lineage(manifest, lived)
            judged = self._judge(folder, manifest, live_folder, status, stop)
            if judged.action == "wait":
                return None
            verdict = replace(judged, candidate=candidate.version, live=live.version, at=self._swapper.clock())
            if verdict.action == "promote":
                self._keep_watched()
                return self._swapper.exchange(folder, candidate.version, self._with_start(verdict))
        except DrafterRejected as error:
            better = f"better ({verdict.reason}), but " if verdict.action == "promote" else ""
            verdict = replace(verdict, action="reject", reason=f"{better}{error}", at=self._swapper.clock())
        self._journal.append(verdict)
        self._swapper.tidy(keep={live.version, self._journal.predecessor(live.version) or live.version})
        return verdict

    def _judge(
        self, folder: Path, manifest: Manifest, live_folder: Path, status: EngineStatus, stop: threading.Event
    ) -> Decision:
        """The gate's verdict on fair recent traces; "wait" while there are too few of them."""
        since = self._swapper.clock() - self._settings.gate_max_age_s
        traces = self._evidence.recent(status, manifest.offsets, since)
        asked = (str(folder), *(t.trace_id for t in traces))
        wait = Decision(action="wait", reason=f"{len(traces)} traces")
        if len(traces) < self._rules.min_traces or asked == self._undecided.get(str(folder)):
            return wait
        candidate = self._replay.score(folder, traces)
        if stop.is_set():
            return wait
        live = self._score_served(live_folder, traces)
        baseline = None if self._baseline is None else self._score_served(self._baseline, traces)
        today = mix(self._evidence.today(status))
        rules = replace(self._rules, cost=gate.measured(status, self._rules.cost))
        verdict = gate.judge(candidate, live, rules, baseline=baseline, mix=today)
        self._undecided.pop(str(folder), None)
        self._undecided[str(folder)] = asked
        while len(self._undecided) > 2:  # one for each alias
            self._undecided.pop(next(iter(self._undecided)))
        return replace(verdict, evidence=verdict.evidence | {"drifted_domains": float(len(self._drift.domains))})

    def _score_served(self, folder: Path, traces: list[Trace]) -> list[ReplayScore]:
        """Scores of a drafter that has served: that it cannot be replayed is not the candidate's fault."""
        try:
            return self._replay.score(folder, traces)
        except DrafterRejected as error:
            raise SwapFailed(f"{folder}: cannot replay the drafter in service: {error}") from error

    def _with_start(self, promotion: Decision) -> Decision:
        """A promotion with what the watch will compare against, read as late as possible."""
        status = self._swapper.engine.status()
        self._meter.observe(status)
        tokens, rounds = status.by_drafter.get(promotion.candidate or "", (0, 0))
        observed = self._meter.accept_length
        start = {
            "previous_accept_length": promotion.evidence["live_accept_length"] if observed is None else observed,
            "tokens_at_swap": float(tokens),
            "rounds_at_swap": float(rounds),
            "requests_at_swap": float(status.requests_by_drafter.get(promotion.candidate or "", 0)),
            "served_at_swap": float(status.rounds),
        }
        return replace(promotion, evidence=promotion.evidence | start)


def _require_lineage(candidate: Manifest, live: Manifest) -> None:
    """Only a version that begins a lineage may change the draft vocabulary: others were overtaken by one that did."""
    ours, theirs = checkpoint.lineage(candidate.tensors), checkpoint.lineage(live.tensors)
    if ours != theirs and candidate.vocabulary == "kept":
        raise DrafterRejected(
            f"tensor d2t: the draft vocabulary is not the live drafter's (lineage {ours}, not {theirs});"
            " `livedraft drafts refresh-vocabulary` begins another"
        )
