"""The trace stream on a broker against the bare client, side by side on the same messages."""

from __future__ import annotations

import contextlib
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from livedraft.cli.local_broker import memory_broker
from livedraft.cli.provenance import provenance, write
from livedraft.contracts.errors import StreamUnavailable
from livedraft.contracts.messages import Features, Rounds, Sampling, Trace
from livedraft.contracts.settings import Kafka, Traces
from livedraft.traces.arrays import from_numpy
from livedraft.traces.codec import encode
from livedraft.traces.kafka_client import RawClient, ensure_topics
from livedraft.traces.kafka_source import KafkaSource
from livedraft.traces.urls import broker_addresses, open_sink
from rich.console import Console
from rich.progress import track

_console = Console(stderr=True)
_SIZES = {"64KB": 64 << 10, "1MB": 1 << 20}
#: Sent by each side in each repeat.
_VOLUME = 64 << 20
_PARTITIONS = 4


def stream(place: Path | None, url: str, repeats: int) -> None:
    """See ``livedraft bench stream --help``."""
    sizes = {name: _measure(url, size, repeats) for name, size in _SIZES.items()}
    rates = {key: min(size[key] for size in sizes.values()) for key in ("produce_mb_s", "consume_mb_s")}
    ratios = [size[key] for size in sizes.values() for key in ("produce_ratio", "consume_ratio")]
    report = {
        **rates,
        "ratio_over_raw_client": min(ratios),
        "sizes": sizes,
        "volume_mb": _VOLUME / 1e6,
        "repeats": repeats,
        "provenance": provenance() | {"client": version("kafka-python"), "crc32c": version("crc32c")},
    }
    write(report, place)


def _measure(url: str, size: int, repeats: int) -> dict[str, float]:
    """Medians over interleaved repeats; every one on topics of its own."""
    trace = make_trace(size)
    count = _VOLUME // len(encode(trace))
    traces = [msgspec.structs.replace(trace, trace_id=f"{n}", request_id=f"{n}") for n in range(count)]
    seen: dict[str, list[float]] = {}
    for _ in track(range(repeats), f"{size >> 10} KB", console=_console):
        for side in (_Ours, _Raw):
            with _broker(url) as at:
                topics = Kafka(prefix=f"bench-{uuid.uuid4().hex[:8]}", partitions=_PARTITIONS, session_timeout_s=2.0)
                ensure_topics(broker_addresses(at), topics)
                produced, consumed = side(at, topics, traces).rates()
            seen.setdefault(f"{side.name}produce_mb_s", []).append(produced)
            seen.setdefault(f"{side.name}consume_mb_s", []).append(consumed)
    found = {name: statistics.median(values) for name, values in seen.items()}
    for way in ("produce", "consume"):
        pairs = zip(seen[f"{way}_mb_s"], seen[f"raw_{way}_mb_s"], strict=True)
        found[f"{way}_ratio"] = statistics.median(ours / raw for ours, raw in pairs)
    return {name: round(value, 3) for name, value in found.items()}


@contextlib.contextmanager
def _broker(url: str) -> Iterator[str]:
    """``url``; without one, that of a broker started for this measurement: it slows down as its memory fills."""
    if url:
        yield url
        return
    with memory_broker() as broker:
        yield f"kafka://{broker.address}"


class _Side:
    """Sends traces, each with a key of its own, and reads them back; MB/s of encoded traces each way."""

    name = ""

    def __init__(self, url: str, topics: Kafka, traces: Sequence[Trace]) -> None:
        self._url, self._topics, self._traces, self._count = url, topics, traces, len(traces)

    def rates(self) -> tuple[float, float]:
        """Produced and consumed, until the last is acknowledged and from the first that arrives."""
        megabytes = sum(len(encode(trace)) for trace in self._traces) / 1e6
        return megabytes / self._produce(), megabytes / self._consume()

    def _produce(self) -> float:
        raise NotImplementedError

    def _consume(self) -> float:
        raise NotImplementedError

    def _drain(self, poll: Callable[[], int]) -> float:
        """Seconds from the first arrival to the last, its share of the first batch left out."""
        first = poll()
        while not first:
            first = poll()
        began, got, deadline = time.perf_counter(), first, time.perf_counter() + 120
        while got < self._count:
            got += poll()
            if time.perf_counter() > deadline:
                raise StreamUnavailable(f"{got} of {self._count} messages came back")
        return (time.perf_counter() - began) * self._count / max(1, self._count - first)


class _Ours(_Side):
    """From ``offer`` to the acknowledgement; from the topic to a decoded, validated trace."""

    def _produce(self) -> float:
        settings = Traces(url=self._url, message_bytes=2 << 20)
        sink = open_sink(settings, kafka=self._topics)
        sink.offer(self._traces[0])
        while not sink.counters().written:
            time.sleep(0.001)
        began = time.perf_counter()
        for number, trace in enumerate(self._traces):
            while number % 8 == 0 and sink.counters().waiting_bytes > settings.buffer_bytes // 2:
                time.sleep(0.001)
            sink.offer(trace)
        while sink.counters().waiting:
            time.sleep(0.0005)
        took = time.perf_counter() - began
        sink.close()
        return took

    def _consume(self) -> float:
        source = KafkaSource(broker_addresses(self._url), self._topics, "bench")
        took = self._drain(lambda: len(source.poll(0.2)))
        source.close()
        return took


class _Raw(_Side):
    """kafka-python alone with our settings, but its own sockets, on ready messages that nobody looks into."""

    name = "raw_"

    def _produce(self) -> float:
        ready = [(trace.request_id.encode(), encode(trace)) for trace in self._traces]
        with contextlib.closing(RawClient(broker_addresses(self._url), self._topics)) as client:
            client.send(*ready[0])
            client.flush()
            began = time.perf_counter()
            for key, message in ready:
                client.send(key, message)
            client.flush()
            return time.perf_counter() - began

    def _consume(self) -> float:
        with contextlib.closing(RawClient(broker_addresses(self._url), self._topics)) as client:
            return self._drain(client.poll)


def make_trace(size: int) -> Trace:
    """A trace whose record has about ``size`` bytes, all of them of verify rounds: no compression in the way."""
    rng = np.random.default_rng(0)
    top_k, depth = 32, 3
    rounds = max(1, (size - 600) // ((top_k * 8 + 4) * (depth + 1) + depth * 11 + 18))
    nodes, rows = rounds * depth, rounds * (depth + 1)
    probabilities = -np.sort(-rng.dirichlet(np.ones(top_k + 1), rows)[:, :top_k], axis=1)
    return Trace(
        trace_id="bench",
        request_id="bench",
        engine="bench",
        target="bench",
        target_revision="0",
        tokenizer_hash="0",
        drafters=("0",),
        started_at=0.0,
        finished_at=1.0,
        sampling=Sampling(),
        top_temperature=1.0,
        finish_reason="length",
        prompt=from_numpy([1], "i4"),
        output=from_numpy(rng.integers(0, 1000, rounds).tolist(), "i4"),
        rounds=Rounds(
            root=from_numpy(list(range(rounds)), "i4"),
            size=from_numpy([depth] * rounds, "i4"),
            drafter=from_numpy([0] * rounds, "i2"),
            tokens=from_numpy(rng.integers(0, 1000, nodes), "i4"),
            parents=from_numpy(list(range(-1, depth - 1)) * rounds, "i2"),
            logprobs=from_numpy(-rng.random(nodes), "f4"),
            accepted=from_numpy([0] * nodes, "u1"),
            bonus=from_numpy(rng.integers(0, 1000, rounds), "i4"),
            top_ids=from_numpy(rng.integers(0, 1000, (rows, top_k)), "i4"),
            top_logprobs=from_numpy(np.log(probabilities), "f4"),
            tail=from_numpy(1 - probabilities.sum(axis=1), "f4"),
        ),
        features=Features(mode="recompute"),
    )
