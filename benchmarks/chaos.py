"""Kills of producer, broker and trainer at random moments, and what that cost.

The trainer is ``livedraft trainer`` itself or, by default, one in little, which starts in a tenth of the time: it
"learns" by adding a trace's id to its state, which it replaces whole together with the offsets, as the real one does
with its weights.
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
from typing import Literal

import msgspec
import numpy as np
from livedraft.benchmarks.stream import make_trace
from livedraft.cli.local_broker import LocalBroker, durable_broker
from livedraft.cli.provenance import provenance, write
from livedraft.cli.settings_file import write_settings
from livedraft.cli.wiring import leave_with_parent
from livedraft.contracts.errors import StreamUnavailable
from livedraft.contracts.messages import Features, Offsets, Record, Trace
from livedraft.contracts.ports import TraceSource
from livedraft.contracts.settings import Engine, Kafka, Registry, Settings, Traces, Trainer, load
from livedraft.contracts.stopping import stopping
from livedraft.traces.arrays import from_numpy
from livedraft.traces.codec import decode, encode
from livedraft.traces.kafka_reader import TopicReader
from livedraft.traces.urls import broker_addresses, open_sink, open_source
from rich.console import Console
from rich.progress import track

_console = Console(stderr=True)
#: Seconds between two kills, and that a broker stays dead.
_PAUSE_S, _DEAD_S = (0.2, 1.5), (0.1, 2.5)
#: Seconds without kills that the offers of which are compared, and that the end may take without any progress.
_CALM_S, _SETTLE_S = 10.0, 120.0
_TRACE_BYTES = 16 << 10
#: Seconds for a real trainer to write a checkpoint of its own, before which it has nothing to lose; and between two
#: traces, of which a real one remembers only so many.
_TRAINER_S, _OFFER_S = 60.0, {"small": 0.005, "real": 0.1}


class Learned(Record, frozen=True, kw_only=True):
    """The state of the little trainer."""

    offsets: Offsets = {}
    traces: frozenset[str] = frozenset()
    deliveries: int = 0
    #: Deliveries whose place in the stream was in this state already: what offsets that came apart would cause.
    repeated: int = 0


Kind = Literal["small", "real"]


def chaos(place: Path | None, seed: int, kills: int, kind: Kind = "small") -> None:
    """See ``livedraft bench chaos --help``."""
    chance = random.Random(seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        durable_broker() as broker,
        contextlib.ExitStack() as children,
    ):
        site = _Site(broker, Path(folder), kind)
        producer, trainer = _Child(site, "producer"), _Child(site, "trainer")
        for child in (producer, trainer):
            children.callback(child.kill)
        producer.wait_for_offers()
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
            elif victim == "producer":
                producer.kill_and_restart()
            else:
                _wait_for_life(site, trainer)
                trainer.kill_and_restart()
            done[victim] += 1
        stormy = producer.latencies()
        producer.stop()
        _send_what_is_spilled(site)
        acknowledged = producer.acknowledged
        learned = _wait_for(site, trainer, acknowledged)
        on_topic = _on_topic(site)
        trainer.stop()
    published = {name for _, _, name in on_topic}
    # Each trace is one message: had offsets and the rest of a state come apart, it would have counted other messages.
    passed = sum(offset < learned.offsets.get(partition, 0) for partition, offset, _ in on_topic)
    report = {
        "trainer": kind,
        "kills": sum(done.values()),
        "killed": dict(done),
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged - learned.traces),
        # Of those, what the broker does not have; the others, the trainer did not come to.
        "not_on_topic": len(acknowledged - published),
        # Messages of a trace that the topic has already: a producer was not told that the first had arrived.
        "sent_twice": len(on_topic) - len(published),
        "trained_twice": learned.repeated + max(0, learned.deliveries - passed),
        "passed_over": max(0, passed - learned.deliveries),
        "p99_ratio": round(_p99(stormy) / _p99(calm), 3),
        "offer_p99_us": {"calm": round(_p99(calm) * 1e6, 1), "stormy": round(_p99(stormy) * 1e6, 1)},
        "offers": {"calm": len(calm), "stormy": len(stormy)},
        "seed": seed,
        "provenance": provenance(),
    }
    write(report, place)


class _Site:
    """What all processes share."""

    def __init__(self, broker: LocalBroker, folder: Path, kind: Kind) -> None:
        self.kind = kind
        self.settings = Settings(
            engine=Engine(draft_intermediate=64),
            traces=Traces(url=f"kafka://{broker.address}", buffer_bytes=16 << 20, held_out=0.0),
            kafka=Kafka(
                prefix="chaos",
                partitions=4,
                session_timeout_s=2.0,
                delivery_timeout_s=3.0,
                spill=str(folder / "spill"),
            ),
            trainer=Trainer(
                folder=str(folder / "trainer"), steps_per_trace=0.1, batch_traces=2, unroll=2, checkpoint_every_s=0.3
            ),
            registry=Registry(url="memory:"),
        )
        self.traces, self.kafka = self.settings.traces, self.settings.kafka
        self.config = write_settings(self.settings, folder / "livedraft.toml")
        self.state = folder / "state.msgpack"
        self.trace = folder / "trace"
        trace = make_trace(_TRACE_BYTES)
        self.trace.write_bytes(encode(trace if kind == "small" else _to_learn_from(trace, self.settings)))

    def command(self, role: str, life: int) -> list[str]:
        """The command line of a process."""
        if role == "trainer" and self.kind == "real":
            return [sys.executable, "-m", "livedraft.cli.main", "trainer", "--config", str(self.config)]
        given = [str(self.config), str(self.trace), str(self.state), self.kind, str(life)]
        return [sys.executable, "-m", "livedraft.benchmarks.chaos", role, *given]

    def learned(self) -> Learned:
        """What the trainer had when it saved last."""
        if self.kind == "small":
            return _load(self.state)
        from livedraft.trainer.learner import LearnerState  # torch, for which no child should wait

        try:
            last = max(self.checkpoints()) / "state.msgpack"
            state = msgspec.msgpack.decode(last.read_bytes(), type=LearnerState)
        except (ValueError, FileNotFoundError):  # none yet, or a newer one has just taken its place
            return Learned()
        repeated = state.counts.get("admitted", 0) - len(set(state.known))
        return Learned(
            offsets=state.offsets,
            traces=frozenset(state.known),
            deliveries=sum(state.counts.values()),
            repeated=repeated,
        )

    def checkpoints(self) -> set[Path]:
        """Those of a real trainer."""
        return set(Path(self.settings.trainer.folder).glob("checkpoints/step-*"))


def _to_learn_from(trace: Trace, settings: Settings) -> Trace:
    """As the target of ``settings`` would have left it: its name, and features of its width."""
    from livedraft.cli import wiring
    from livedraft.contracts import checkpoint
    from livedraft.serving.local import place
    from livedraft.trainer.target import read_target

    target = read_target(place.find(settings.engine.target))
    manifest = checkpoint.verify(wiring.day_0(settings))[1]
    shape = (trace.prompt.shape[0] + trace.output.shape[0], 3 * int(target.config["hidden_size"]))
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return msgspec.structs.replace(
        trace,
        target=manifest.target,
        target_revision=manifest.target_revision,
        tokenizer_hash=manifest.tokenizer_hash,
        features=Features(mode="inline", layers=target.feature_layers, values=from_numpy(values, "bf2")),
    )


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

    def keep(self) -> None:
        """Another one if it has ended by itself, as a trainer does that finds no broker."""
        if self._process.poll() is not None:
            self.kill_and_restart()

    def stop(self) -> None:
        """SIGTERM."""
        self._process.terminate()
        self._ended()

    def wait_for_offers(self) -> None:
        """Until it has begun."""
        deadline = time.monotonic() + _SETTLE_S
        while not self._latencies:
            if time.monotonic() > deadline:
                raise StreamUnavailable(f"the {self._role} offers nothing")
            time.sleep(0.05)

    def latencies(self) -> list[float]:
        """Seconds of each offer since the last time this was asked."""
        found, self._latencies = self._latencies, []
        return found

    def _start(self) -> None:
        self._life += 1
        command = self._site.command(self._role, self._life)
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=leave_with_parent
        )
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


def _on_topic(site: _Site) -> list[tuple[str, int, str]]:
    """Partition, offset and id of each trace on the topic; a broker that is slow is asked again."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        try:
            with contextlib.closing(TopicReader(broker_addresses(site.traces.url), site.kafka)) as reader:
                found = reader.read(dict.fromkeys(reader.bounds(), 0))
                return [(d.partition, d.offset, d.item.trace_id) for d in found if isinstance(d.item, Trace)]
        except StreamUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _wait_for_life(site: _Site, trainer: _Child) -> None:
    """Until a real trainer has written a checkpoint since it was started."""
    before, deadline = site.checkpoints(), time.monotonic() + _TRAINER_S
    while site.kind == "real" and not site.checkpoints() - before and time.monotonic() < deadline:
        trainer.keep()
        time.sleep(0.05)


def _wait_for(site: _Site, trainer: _Child, acknowledged: set[str]) -> Learned:
    """What the trainer has learned once it has all, or nothing more for too long."""
    learned, deadline = site.learned(), time.monotonic() + _SETTLE_S
    while not acknowledged <= learned.traces and time.monotonic() < deadline:
        trainer.keep()
        time.sleep(0.2)
        before, learned = learned, site.learned()
        if len(learned.traces) > len(before.traces):
            deadline = time.monotonic() + _SETTLE_S
    return learned


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def _load(path: Path) -> Learned:
    return msgspec.msgpack.decode(path.read_bytes(), type=Learned) if path.exists() else Learned()


def _produce(settings: Settings, trace: Trace, kind: Kind, life: str) -> None:
    """Offer for ever; a trace is acknowledged once the sink has counted it as written or spilled, in order."""
    sink = open_sink(settings.traces, kafka=settings.kafka)
    names, told = list[str](), 0
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
            if names:  # the first of a life finds code and caches cold, whatever is killed
                os.write(1, f"offer {time.perf_counter() - began:.9f}\n".encode())
            if taken:
                names.append(name)
            time.sleep(_OFFER_S[kind])
    sink.close(10)


def _train(settings: Settings, state: Path) -> None:
    """Learn for ever; state and offsets are replaced together a few times a second."""
    learned = _load(state)
    source = _open_source(settings)
    offsets, traces_seen = dict(learned.offsets), set(learned.traces)
    deliveries, repeated = learned.deliveries, learned.repeated

    def save() -> None:
        half = state.with_suffix(".half")
        now = Learned(offsets=offsets, traces=frozenset(traces_seen), deliveries=deliveries, repeated=repeated)
        half.write_bytes(msgspec.msgpack.encode(now))
        half.replace(state)
        source.commit(offsets)

    source.on_release(save)
    source.seek(offsets)
    saved_at = time.monotonic()
    with stopping() as stop:
        while not stop.is_set():
            for delivery in source.poll(0.2):
                deliveries += 1
                repeated += delivery.offset < offsets.get(delivery.partition, 0)
                if isinstance(delivery.item, Trace):
                    traces_seen.add(delivery.item.trace_id)
                offsets[delivery.partition] = delivery.offset + 1
            if time.monotonic() - saved_at > 0.3:
                save()
                saved_at = time.monotonic()
    save()
    source.close()


def _open_source(settings: Settings) -> TraceSource:
    """Tried again while the broker is dead: a trainer that cannot start is started again."""
    while True:
        try:
            return open_source(settings.traces, "trainer", settings.kafka)
        except StreamUnavailable:
            time.sleep(0.2)


def _main(role: str, config: str, trace: str, state: str, kind: str, life: str) -> None:
    settings = load(Path(config), {})
    if role == "producer":
        _produce(settings, decode(Path(trace).read_bytes()), "real" if kind == "real" else "small", life)
    else:
        _train(settings, Path(state))


if __name__ == "__main__":
    _main(*sys.argv[1:])
