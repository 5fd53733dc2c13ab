"""Drift: has a domain's acceptance fallen for good?

Page-Hinkley's test for a decrease of the mean (Page 1954, "Continuous inspection schemes", Biometrika 41) over
residuals: observed minus predicted accept length of each trace.  With m the running mean of the residuals and
``slack`` the change that is tolerated,

    U_t = U_{t-1} + (x_t - m_t + slack),    P_t = max_{i<=t} U_i,    drift when P_t - U_t > threshold.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from livedraft.contracts.messages import Record, Trace
from msgspec.structs import replace

log = logging.getLogger(__name__)


class PageHinkley(Record, frozen=True, kw_only=True):
    """The test's state.  A new one starts a new test, as after an alarm or a swap.

    The defaults suit accept lengths per trace (spread about 0.5): a fall by 1.0 is found in about ten traces, and
    without a change an alarm is rarer than one in hundreds.
    """

    #: Accept length by which the mean may fall unnoticed.
    slack: float = 0.1
    threshold: float = 8.0
    #: Fewest residuals before an alarm.
    warm_up: int = 8
    count: int = 0
    mean: float = 0.0
    #: U_t and P_t.
    sum: float = 0.0
    peak: float = 0.0

    def observe(self, residual: float) -> PageHinkley:
        """The state after one more residual."""
        mean = self.mean + (residual - self.mean) / (self.count + 1)
        total = self.sum + residual - mean + self.slack
        return replace(self, count=self.count + 1, mean=mean, sum=total, peak=max(self.peak, total))

    @property
    def drifted(self) -> bool:
        """Whether the mean has fallen."""
        return self.count >= self.warm_up and self.peak - self.sum > self.threshold


class DriftByDomain:
    """One test per domain, over the traces that a single drafter with a known prediction served."""

    def __init__(self) -> None:
        self._tests: dict[str, PageHinkley] = {}
        #: Domains that have drifted.
        self.domains: set[str] = set()

    def observe(self, traces: Iterable[Trace], predicted: Mapping[str, float]) -> None:
        """Feed traces in order.  ``predicted``: accept length by drafter version."""
        for trace in traces:
            rounds = trace.rounds.root.shape[0]
            if len(trace.drafters) != 1 or trace.drafters[0] not in predicted or not rounds:
                continue
            residual = trace.output.shape[0] / rounds - predicted[trace.drafters[0]]
            test = self._tests.get(trace.domain, PageHinkley()).observe(residual)
            if test.drifted:
                log.warning("acceptance in domain %r has fallen: mean residual %.2f", trace.domain, test.mean)
                self.domains.add(trace.domain)
                test = PageHinkley()
            self._tests[trace.domain] = test
