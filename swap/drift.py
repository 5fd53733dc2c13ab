"""Drift: has a domain's acceptance fallen for good?

The test (see ``traces.page_hinkley``) is over residuals: observed minus predicted accept length of each trace.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from livedraft.contracts.messages import Trace
from livedraft.traces.page_hinkley import PageHinkley

log = logging.getLogger(__name__)


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
