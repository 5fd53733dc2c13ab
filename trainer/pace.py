"""How hard to learn, from how well new traces are predicted before they are learned from.  Pure decisions.

Each new trace is drafted for before the drafter has learned from it (Dawid 1984: prequential), and each step says how
well its batch was drafted for.  From these two:

    recovering  acceptance of new traces has fallen for good (Page-Hinkley): learn from what came since, first of all
    steady      it grows: learn as fast as time allows
    resting     for long it has not: learn from each new trace once, and leave the processor to others

The learning rate stays as it is in all three: what is published is the mean of the path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from livedraft.contracts.messages import Record
from livedraft.traces.page_hinkley import PageHinkley
from msgspec.structs import replace

#: Steps in a block; growth is what the mean accept length of one gains on that of the one before.
_BLOCK = 100
#: Growth per block below which a recovery is over.
_RECOVERED = 0.03
#: Blocks in a row that must not have grown before it rests.
_STILL = 3
#: Weight of the newest batch in the level.
_RATE = 0.1
#: All traffic together: a domain that was never seen has no past of its own to fall from.
_ALL = ""
#: Domains tested apart: clients choose their names.
_DOMAINS = 64

Mode = Literal["steady", "recovering", "resting"]


class Pace(Record, frozen=True, kw_only=True):
    """What is known so far; part of a learner's state, so that a restart goes on as it would have."""

    mode: Mode = "steady"
    #: Why.
    reason: str = "it has just begun"
    tests: Mapping[str, PageHinkley] = {}
    #: Recent accept length of batches; 0 before the first.
    level: float = 0.0
    #: Steps and summed accept length of this block, and the mean of the one before (0: none).
    steps: int = 0
    total: float = 0.0
    before: float = 0.0
    #: Blocks in a row without growth.
    still: int = 0
    #: Times that acceptance has fallen for good, and steps since it last did, or since the beginning.
    drifts: int = 0
    since: int = 0

    def heard(self, scores: Iterable[tuple[str, float]]) -> Pace:
        """After (domain, accept length) of new traces, drafted for before they were learned from."""
        tests, fallen = dict(self.tests), list[str]()
        for domain, accept_length in scores:
            for name in (_ALL, domain):
                if name in tests or len(tests) < _DOMAINS:
                    tests[name] = tests.get(name, PageHinkley()).observe(accept_length)
                    if tests[name].drifted:
                        fallen.append(f"domain {domain!r}" if name else "the traffic")
        if not fallen:
            return replace(self, tests=tests)
        return replace(
            self,
            mode="recovering",
            reason=f"acceptance in {fallen[0]} has fallen",
            tests={},
            steps=0,
            total=0.0,
            before=0.0,
            still=0,
            drifts=self.drifts + 1,
            since=0,
        )

    def stepped(self, accept_length: float, rest_below: float) -> Pace:
        """After a step whose batch had this accept length; growth per block below ``rest_below`` is none."""
        level = self.level + _RATE * (accept_length - self.level) if self.level else accept_length
        total = self.total + accept_length
        after = replace(self, level=level, steps=self.steps + 1, total=total, since=self.since + 1)
        if after.steps < _BLOCK:
            return after
        mean = after.total / after.steps
        growth = mean / self.before - 1 if self.before else None
        after = replace(after, steps=0, total=0.0, before=mean)
        return after if growth is None else after._grown(growth, rest_below)

    def _grown(self, growth: float, rest_below: float) -> Pace:
        said = f"accept length grew by {growth:.1%} in {_BLOCK} steps"
        still = self.still + 1 if growth < rest_below else 0
        if still >= _STILL:
            return replace(self, mode="resting", reason=said, still=still)
        if self.mode == "recovering" and growth >= _RECOVERED:
            return replace(self, reason=said, still=still)
        return replace(self, mode="steady", reason=said, still=still)


class Candidates(Record, frozen=True, kw_only=True):
    """When to publish: on a gain worth a swap, neither too soon after the last candidate nor too long."""

    gain: float
    least_s: float
    most_s: float
    #: When the last one was published, and the lowest level since (0: none yet).
    published_at: float
    lowest: float = 0.0

    def learned(self, level: float) -> Candidates:
        """After a step, at this level.  From the lowest: after a fall it is the way up that counts."""
        return replace(self, lowest=min(self.lowest or level, level))

    def published(self, now: float) -> Candidates:
        """After a candidate."""
        return replace(self, published_at=now, lowest=0.0)

    def due(self, level: float, now: float) -> tuple[bool, str]:
        """Whether to publish, and why.  Ask only where something was learned since the last."""
        seconds = now - self.published_at
        if seconds >= self.most_s:
            return True, f"{seconds:.0f} s since the last"
        if seconds < self.least_s:
            return False, f"{seconds:.0f} s since the last, {self.least_s:g} s at least"
        gained = level / self.lowest - 1 if self.lowest else 0.0
        return gained >= self.gain, f"accept length up by {gained:.1%} since the last, {self.gain:.1%} is worth a swap"
