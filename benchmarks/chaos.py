"""Kills of producer, broker and trainer at random moments, and what that cost.

The trainer here is one in little: it "learns" by adding a trace's id to its state, which it replaces whole together
with the offsets, as the real one does with its weights.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
from livedraft.benchmarks.stream import make_trace
from livedraft.cli.local_broker import LocalBroker, durable_broker
from livedraft.cli.provenance import provenance, write
from livedraft.contracts.errors import StreamUnavailable
from livedraft.contracts.messages import Offsets, Record, Trace
from livedraft.contracts.ports import TraceSource
from livedraft.contracts.settings import Kafka, Traces
from livedraft.contracts.stopping import stopping
from livedraft.traces.kafka_reader import TopicReader
from livedraft.traces.urls import broker_addresses, open_sink, open_source
from rich.console import Console
from rich.progress import track

_console = Console(stderr=True)
#: Seconds between two kills, and that a broker stays dead.
_PAUSE_S, _DEAD_S = (0.2, 1.5), (0.1, 2.5)
#: Seconds without kills that the offers of which are compared, and for everything to arrive in the end.
_CALM_S, _SETTLE_S = 10.0, 120.0
_TRACE_BYTES = 16 << 10


class Learned(Record, frozen=True, kw_only=True):
    """The state of the little trainer."""

    offsets: Offsets = {}
    traces: frozenset[str] = frozenset()
    #: Deliveries whose place in the stream was in this state already: what offsets that came apart would cause.
    repeated: int = 0


def chaos(place: Path | None, seed: int, kills: int) -> None:
    """See ``livedraft bench chaos --help``."""
    chance = random.Random(seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        durable_broker() as broker,
        contextlib.ExitStack() as children,
    ):
        site = _Site(broker, Path(folder))
        producer, trainer = _Child(site, "producer"), _Child(site, "trainer")
        for child in (producer, trainer):
            children.callback(child.kill)
        time.sleep(_CALM_S)
        calm = producer.latencies()
        done: Counter[str] = Counter()
        for _ in track(range(kills), "killing", console=_console):
            time.sleep(chance.uniform(*_PAUSE_S))
            victim = chance.choice(("producer", "broker", "trainer"))
            if victim == "broker":
                broker.kill()
                time.sleep(chance.uniform(*_DEAD_S))
                broker.start()
            else:
                (producer if victim == "producer" else trainer).kill_and_restart()
            done[victim] += 1
        stormy = producer.latencies()
        producer.stop()
        _send_what_is_spilled(site)
        acknowledged = producer.acknowledged
        learned = _wait_for(site, acknowledged)
        published = _published(site)
        trainer.stop()
    report = {
        "kills": sum(done.values()),
        "killed": dict(done),
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged - learned.traces),
        # Of those, what the broker does not have; the others, the trainer did not come to.
        "not_on_topic": len(acknowledged - published),
        "trained_twice": learned.repeated,
        "p99_ratio": round(_p99(stormy) / _p99(calm), 3),
        "offer_p99_us": {"calm": round(_p99(calm) * 1e6, 1), "stormy": round(_p99(stormy) * 1e6, 1)},
        "offers": {"calm": len(calm), "stormy": len(stormy)},
        "seed": seed,
        "provenance": provenance(),
    }
    write(report, place)


class _Site:
    """What all processes share."""

    def __init__(self, broker: LocalBroker, folder: Path) -> None:
        self.traces = Traces(url=f"kafka://{broker.address}", buffer_bytes=16 << 20)
        self.kafka = Kafka(
            prefix="chaos",
            partitions=4,
            session_timeout_s=2.0,
            delivery_timeout_s=3.0,
            spill=str(folder / "spill"),
        )
        self.state = folder / "state.msgpack"


class _Child:
    """A process that is started again; of a producer, the lines it says are kept."""

    def __init__(self, site: _Site, role: str) -> None:
        self._site, self._role, self._life = site, role, 0
        self.acknowledged: set[str] = set()
        self._latencies: list[float] = []
        self._start()

    def kill(self) -> None:
        """SIGKILL.  Safe to call after the end."""
        self._process.kill()
        self._ended()

    def kill_and_restart(self) -> None:
        """SIGKILL, and another one at once."""
        self.kill()
        self._start()

    def stop(self) -> None:
        """SIGTERM."""
        self._process.terminate()
        self._ended()

    def latencies(self) -> list[float]:
        """Seconds of each offer since the last time this was asked."""
        found, self._latencies = self._latencies, []
        return found

    def _start(self) -> None:
        self._life += 1
        site = self._site
        given = [msgspec.json.encode(what).decode() for what in (site.traces, site.kafka)]
        module = [sys.executable, "-m", "livedraft.benchmarks.chaos"]
        command = [*module, self._role, *given, str(site.state), f"{self._life}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _ended(self) -> None:
        self._process.wait(60)
        self._listener.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            kind, _, value = line.rstrip("\n").partition(" ")
            if not line.endswith("\n"):  # cut off by the kill
                continue
            if kind == "acknowledged":
                self.acknowledged.add(value)
            else:
                self._latencies.append(float(value))


def _send_what_is_spilled(site: _Site) -> None:
    sink = open_sink(site.traces, kafka=site.kafka)
    deadline = time.monotonic() + _SETTLE_S
    while sink.counters().lag and time.monotonic() < deadline:
        time.sleep(0.05)
    sink.close(10)


def _published(site: _Site) -> set[str]:
    """Ids of all traces on the topic."""
    with contextlib.closing(TopicReader(broker_addresses(site.traces.url), site.kafka)) as reader:
        start = dict.fromkeys(reader.bounds(), 0)
        return {d.item.trace_id for d in reader.read(start) if isinstance(d.item, Trace)}


def _wait_for(site: _Site, acknowledged: set[str]) -> Learned:
    deadline = time.monotonic() + _SETTLE_S
    while True:
        learned = _load(site.state)
        if acknowledged <= learned.traces or time.monotonic() > deadline:
            return learned
        time.sleep(0.2)


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def _load(path: Path) -> Learned:
    return msgspec.msgpack.decode(path.read_bytes(), type=Learned) if path.exists() else Learned()


def _produce(traces: Traces, kafka: Kafka, life: str) -> None:
    """Offer for ever; a trace is acknowledged once the sink has counted it as written or spilled, in order."""
    sink = open_sink(traces, kafka=kafka)
    trace, names, told = make_trace(_TRACE_BYTES), list[str](), 0
    with stopping() as stop:
        while True:
            counters = sink.counters()
            for name in names[told : counters.written + counters.spilled]:
                os.write(1, f"acknowledged {name}\n".encode())
                told += 1
            if stop.is_set():
                break
            name = f"{life}-{len(names)}"
            renamed = msgspec.structs.replace(
                trace, trace_id=name, request_id=f"{life}-{len(names) % 7}", finished_at=time.time()
            )
            began = time.perf_counter()
            taken = sink.offer(renamed)
            os.write(1, f"offer {time.perf_counter() - began:.9f}\n".encode())
            if taken:
                names.append(name)
            time.sleep(0.005)
    sink.close(10)


def _train(traces: Traces, kafka: Kafka, state: Path) -> None:
    """Learn for ever; state and offsets are replaced together a few times a second."""
    learned = _load(state)
    source = _open_source(traces, kafka)
    offsets, traces_seen, repeated = dict(learned.offsets), set(learned.traces), learned.repeated

    def save() -> None:
        half = state.with_suffix(".half")
        half.write_bytes(
            msgspec.msgpack.encode(Learned(offsets=offsets, traces=frozenset(traces_seen), repeated=repeated))
        )
        half.replace(state)
        source.commit(offsets)

    source.on_release(save)
    source.seek(offsets)
    saved_at = time.monotonic()
    with stopping() as stop:
        while not stop.is_set():
            for delivery in source.poll(0.2):
                repeated += delivery.offset < offsets.get(delivery.partition, 0)
                if isinstance(delivery.item, Trace):
                    traces_seen.add(delivery.item.trace_id)
                offsets[delivery.partition] = delivery.offset + 1
            if time.monotonic() - saved_at > 0.3:
                save()
                saved_at = time.monotonic()
    save()
    source.close()


def _open_source(traces: Traces, kafka: Kafka) -> TraceSource:
    """Tried again while the broker is dead: a trainer that cannot start is started again."""
    while True:
        try:
            return open_source(traces, "trainer", kafka)
        except StreamUnavailable:
            time.sleep(0.2)


def _main(role: str, traces: str, kafka: str, state: str, life: str) -> None:
    stream, broker = msgspec.json.decode(traces, type=Traces), msgspec.json.decode(kafka, type=Kafka)
    if role == "producer":
        _produce(stream, broker, life)
    else:
        _train(stream, broker, Path(state))


if __name__ == "__main__":
    _main(*sys.argv[1:])
