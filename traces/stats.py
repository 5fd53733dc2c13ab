"""What a stretch of the stream says about drafting."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from livedraft.contracts.messages import DeadLetter, Delivery, Record, Trace
from livedraft.traces.arrays import tensor_bytes, to_numpy
from numpy.typing import NDArray


class Drafting(Record, frozen=True, kw_only=True):
    """Tokens committed by verify rounds."""

    rounds: int = 0
    tokens: int = 0

    @property
    def accept_length(self) -> float:
        """Committed tokens per verify round, bonus included; 1.0 without rounds, as without speculation."""
        return self.tokens / self.rounds if self.rounds else 1.0

    def __add__(self, other: Drafting) -> Drafting:
        return Drafting(rounds=self.rounds + other.rounds, tokens=self.tokens + other.tokens)


class Acceptance(Record, frozen=True, kw_only=True):
    """At one depth: rounds that proposed there after an accepted prefix, and rounds where that was accepted."""

    tried: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """P(proposal at this depth accepted | its prefix accepted)."""
        return self.accepted / self.tried if self.tried else 0.0


class StreamStats(Record, frozen=True, kw_only=True):
    """A stretch of the stream.  ``by_drafter`` and ``acceptance`` are over rounds that speculated."""

    #: Distinct traces; items that were none; traces seen again.
    traces: int
    dead_letters: int
    duplicates: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    #: Of tensors, unpacked.
    tensor_bytes: int
    overall: Drafting
    by_drafter: dict[str, Drafting]
    by_domain: dict[str, Drafting]
    #: At depth 1, 2, ...
    acceptance: tuple[Acceptance, ...]


class _Rounds:
    """The verify rounds of a trace, one row each."""

    def __init__(self, trace: Trace) -> None:
        rounds = trace.rounds
        self.size = to_numpy(rounds.size)
        self.drafter = to_numpy(rounds.drafter)
        count, nodes = len(self.size), rounds.tokens.shape[0]
        of_round = np.repeat(np.arange(count), self.size)
        local = np.arange(nodes) - (np.cumsum(self.size) - self.size)[of_round]
        hit = to_numpy(rounds.accepted).astype(bool)
        self.accepted = np.bincount(of_round[hit], minlength=count)
        # Where the accepted path ends, and whether anything was proposed beyond.
        last = np.full(count, -1)
        last[of_round[hit]] = local[hit]
        self.went_on = np.zeros(count, bool)
        self.went_on[of_round[to_numpy(rounds.parents) == last[of_round]]] = True
        # A stop may have cut the last round short.
        left = trace.prompt.shape[0] + trace.output.shape[0] - 1 - to_numpy(rounds.root)
        self.committed = np.minimum(self.accepted + 1, left)

    def drafting(self, chosen: NDArray[np.bool_]) -> Drafting:
        return Drafting(rounds=int(chosen.sum()), tokens=int(self.committed[chosen].sum()))

    def acceptance(self) -> list[Acceptance]:
        depths = range(1, int((self.accepted + self.went_on).max(initial=0)) + 1)
        return [
            Acceptance(
                tried=int((self.accepted + self.went_on >= depth).sum()), accepted=int((self.accepted >= depth).sum())
            )
            for depth in depths
        ]


class _Totals:
    """The sums that ``summarize`` builds."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.trace_ids: set[str] = set()
        self.request_ids: set[str] = set()
        self.overall = Drafting()
        self.by_drafter: defaultdict[str, Drafting] = defaultdict(Drafting)
        self.by_domain: defaultdict[str, Drafting] = defaultdict(Drafting)
        self.tried: Counter[int] = Counter()
        self.accepted: Counter[int] = Counter()

    def add(self, trace: Trace) -> None:
        if trace.trace_id in self.trace_ids:
            self.counts["duplicates"] += 1
            return
        self.trace_ids.add(trace.trace_id)
        self.request_ids.add(trace.request_id)
        self.counts["prompt_tokens"] += trace.prompt.shape[0]
        self.counts["output_tokens"] += trace.output.shape[0]
        self.counts["tensor_bytes"] += tensor_bytes(trace)
        rounds = _Rounds(trace)
        everything = rounds.drafting(np.ones(len(rounds.size), bool))
        self.overall += everything
        self.by_domain[trace.domain] += everything
        for index, version in enumerate(trace.drafters):
            self.by_drafter[version] += rounds.drafting((rounds.size > 0) & (rounds.drafter == index))
        for depth, acceptance in enumerate(rounds.acceptance()):
            self.tried[depth] += acceptance.tried
            self.accepted[depth] += acceptance.accepted


def summarize(deliveries: Iterable[Delivery]) -> StreamStats:
    """Add a stretch of the stream up.  A trace delivered twice counts once."""
    totals = _Totals()
    for delivery in deliveries:
        if isinstance(delivery.item, DeadLetter):
            totals.counts["dead_letters"] += 1
        else:
            totals.add(delivery.item)
    return StreamStats(
        traces=len(totals.trace_ids),
        dead_letters=totals.counts["dead_letters"],
        duplicates=totals.counts["duplicates"],
        requests=len(totals.request_ids),
        prompt_tokens=totals.counts["prompt_tokens"],
        output_tokens=totals.counts["output_tokens"],
        tensor_bytes=totals.counts["tensor_bytes"],
        overall=totals.overall,
        by_drafter=dict(totals.by_drafter),
        by_domain=dict(totals.by_domain),
        acceptance=tuple(
            Acceptance(tried=totals.tried[depth], accepted=totals.accepted[depth]) for depth in sorted(totals.tried)
        ),
    )
