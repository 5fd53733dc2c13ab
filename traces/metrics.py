"""What a sink counts, as metrics; for processes that have prometheus-client."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from livedraft.contracts import metrics as names
from livedraft.traces.sink import SinkCounters
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class StreamCollector(Collector):
    """What became of the traces behind the engine: the sink's counters."""

    def __init__(self, counters: Callable[[], SinkCounters]) -> None:
        self._counters = counters

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the sink."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the sink once."""
        seen = self._counters()
        dropped = CounterMetricFamily(names.STREAM_DROPPED, "Traces dropped, by reason.", labels=["reason"])
        for reason, count in seen.dropped.items():
            dropped.add_metric([reason], count)
        yield dropped
        yield CounterMetricFamily(names.STREAM_WRITTEN, "Traces on disk, or acknowledged by the broker.", seen.written)
        yield CounterMetricFamily(names.STREAM_WRITTEN_BYTES, "Bytes of their messages.", seen.written_bytes)
        yield CounterMetricFamily(names.STREAM_SPILLED, "Traces laid down while the broker was away.", seen.spilled)
        yield CounterMetricFamily(names.STREAM_BACKFILLED, "Of those, acknowledged since.", seen.backfilled)
        yield GaugeMetricFamily(names.STREAM_SPILL_LAG, "Traces in the spill.", seen.lag)
        yield GaugeMetricFamily(names.STREAM_WAITING_BYTES, "Bytes of traces in memory.", seen.waiting_bytes)
        yield GaugeMetricFamily(names.STREAM_IN_FLIGHT_BYTES, "Of those, sent to the broker.", seen.in_flight_bytes)
        age = "Seconds since the end of the oldest request whose trace the broker has not acknowledged."
        yield GaugeMetricFamily(names.STREAM_AGE_SECONDS, age, seen.age_s)
