"""What trainer, controller and relay know about themselves, as metrics; read at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from livedraft.cli.status import TrainerProgress
from livedraft.contracts import metrics as names
from livedraft.contracts.settings import Trainer
from livedraft.swap.journal import Journal
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from livedraft.traces.relay import Relay


class TrainerCollector(Collector):
    """``progress.json``.  Before the first one there is nothing to tell."""

    def __init__(self, settings: Trainer) -> None:
        self._path = Path(settings.folder) / "progress.json"

    def collect(self) -> Iterator[Metric]:
        """Read it once."""
        try:
            progress = msgspec.json.decode(self._path.read_bytes(), type=TrainerProgress)
        except (OSError, msgspec.DecodeError):
            return
        yield CounterMetricFamily(names.TRAINER_STEPS, "Optimiser steps taken.", progress.steps)
        yield CounterMetricFamily(names.TRAINER_TOKENS, "Positions learned from.", progress.tokens)
        if progress.lag is not None:
            yield GaugeMetricFamily(names.TRAINER_LAG, "Records written but not yet read by the trainer.", progress.lag)
        about = "Share of the target's probability on tokens that the drafter cannot propose."
        yield GaugeMetricFamily(names.TRAINER_EXCLUDED, about, progress.excluded)
        if progress.loss is not None:
            yield GaugeMetricFamily(names.TRAINER_LOSS, "Loss of the last step.", progress.loss)


class ControllerCollector(Collector):
    """The journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def collect(self) -> Iterator[Metric]:
        """Count decisions by action."""
        decisions = CounterMetricFamily(names.DECISIONS, "Decisions written down.", labels=["action"])
        for action, count in Counter(decision.action for decision in self._journal.decisions()).items():
            decisions.add_metric([action], count)
        yield decisions


class RelayCollector(Collector):
    """A relay; what becomes of its traces is the sink's to tell."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def collect(self) -> Iterator[Metric]:
        """Read the counters."""
        traces = CounterMetricFamily(names.RELAY_TRACES, "Messages from engines.", labels=["fate"])
        malformed = self._relay.malformed
        traces.add_metric(["malformed"], malformed)
        traces.add_metric(["offered"], self._relay.received - malformed)
        yield traces
        yield CounterMetricFamily(names.RELAY_BYTES, "Bytes from engines.", self._relay.received_bytes)
