"""``livedraft trainer`` itself on a broker, killed in mid-stream and joined by another in the middle of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from livedraft.cli import wiring
from livedraft.cli.settings_file import write_settings
from livedraft.contracts.settings import Engine, Kafka, Registry, Settings, Traces
from livedraft.traces.kafka_source import KafkaSource
from livedraft.traces.urls import open_sink, open_source
from livedraft.trainer.learner import LearnerState
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor

from .lockstep import LOCKSTEP, TraceMaker

#: Traces of the stream that trainers are killed in, and how many had been used when they were.
COUNT, KILLS = 120, (15, 40, 70)

# kafka-python leaves the sockets of failed connections to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Trainers:
    """Trainers of one stream, each in a folder of its own, in lockstep with what they read."""

    def __init__(self, broker: str, root: Path) -> None:
        self._root = root
        self._processes: list[subprocess.Popen[bytes]] = []
        self.settings = Settings(
            engine=Engine(draft_intermediate=64),
            traces=Traces(url=f"kafka://{broker}", held_out=0.0),
            kafka=Kafka(prefix=f"e2e-{uuid.uuid4().hex[:8]}", partitions=1, session_timeout_s=2.0),
            registry=Registry(url="memory:"),
            trainer=replace(LOCKSTEP, checkpoint_every_s=0.1),
        )
        self.trace = TraceMaker(self.settings, root)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """``livedraft trainer`` in the folder ``name``."""
        settings = replace(
            self.settings,
            trainer=replace(self.settings.trainer, folder=str(self._root / name)),
            kafka=replace(self.settings.kafka, member=name),
        )
        config = write_settings(settings, self._root / f"{name}.toml")
        command = [sys.executable, "-m", "livedraft.cli.main", "trainer", "--config", str(config)]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        with (self._root / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(
                command, stdout=log, stderr=log, env=environ, preexec_fn=wiring.leave_with_parent
            )
        self._processes.append(started)
        return started

    def kill(self) -> None:
        """End what is left."""
        for process in self._processes:
            process.kill()
            process.wait()

    def checkpoints(self, name: str) -> set[Path]:
        return set((self._root / name / "checkpoints").glob("step-*"))

    def used(self, *names: str) -> int:
        """Deliveries in the last checkpoints, which are named by them."""
        return sum(max((int(path.name.split("-")[2]) for path in self.checkpoints(name)), default=0) for name in names)

    def has_used(self, count: int, *names: str) -> bool:
        return self.used(*names) >= count

    def outcome(self, name: str) -> tuple[LearnerState, dict[str, Tensor]]:
        """All of a trainer in its last checkpoint."""
        last = max(self.checkpoints(name))
        state = msgspec.msgpack.decode((last / "state.msgpack").read_bytes(), type=LearnerState)
        return state, load_file(last / "tensors.safetensors")

    def until(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Nothing but a kill ends a trainer before."""
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(path.read_text()[-3000:] for path in self._root.glob("*.log"))
            assert all(process.poll() in (None, -signal.SIGKILL) for process in self._processes), logs
            assert time.monotonic() < deadline, logs
            time.sleep(0.002)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """As an operator ends it."""
        process.terminate()
        assert process.wait(60) == 0
        self._processes.remove(process)

    def set_group_back(self) -> None:
        """The next trainer without a checkpoint begins at the first trace again."""
        with contextlib.closing(open_source(self.settings.traces, "trainer", self.settings.kafka)) as source:
            assert isinstance(source, KafkaSource)
            self.until(lambda: not source.poll(0.2) and bool(source.partitions))
            source.commit(dict.fromkeys(source.partitions, 0))
            assert set(source.committed().values()) == {0}


@pytest.fixture
def trainers(broker_address: str, tmp_path: Path) -> Iterator[Trainers]:
    made = Trainers(broker_address, tmp_path)
    yield made
    made.kill()


@pytest.mark.timeout(1500)
def test_a_trainer_killed_in_mid_stream_becomes_what_an_uninterrupted_one_is(trainers: Trainers) -> None:
    """To the last bit, optimiser and averages included: every trace is trained on once."""
    sink = open_sink(trainers.settings.traces, kafka=trainers.settings.kafka)
    assert all(sink.offer(trainers.trace(number)) for number in range(COUNT))
    sink.close(30)
    assert sink.counters().written == COUNT

    whole = trainers.start("whole")
    trainers.until(lambda: trainers.used("whole") == COUNT)
    trainers.finish(whole)
    expected, weights = trainers.outcome("whole")
    assert expected.counts == {"admitted": COUNT}
    assert expected.steps == COUNT // 2

    trainers.set_group_back()
    chance = random.Random(0)
    for used in KILLS:
        killed = trainers.start("killed")
        trainers.until(partial(trainers.has_used, used, "killed"))
        time.sleep(chance.uniform(0, 0.1))  # in the middle of a step, of a checkpoint, of a commit
        killed.kill()
        killed.wait()
        assert trainers.used("killed") < COUNT, "it was killed too late to tell anything"
    last = trainers.start("killed")
    trainers.until(lambda: trainers.used("killed") == COUNT)
    trainers.finish(last)

    found, tensors = trainers.outcome("killed")
    assert found == expected
    assert tensors.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(tensors[name], weights[name])] == []


@pytest.mark.timeout(1500)
def test_a_trainer_that_joins_another_takes_over_partitions_and_no_trace_is_trained_on_twice(
    trainers: Trainers,
) -> None:
    """Which of the two gets which trace is for time to decide: that each has one owner is not."""
    trainers.settings = replace(trainers.settings, kafka=replace(trainers.settings.kafka, partitions=4))
    sink = open_sink(trainers.settings.traces, kafka=trainers.settings.kafka)
    count = 0

    def offer() -> None:
        nonlocal count
        assert sink.offer(trainers.trace(count))
        count += 1
        time.sleep(0.02)

    def goes_on() -> bool:
        offer()
        return trainers.used("first") >= 40

    def both_work() -> bool:
        offer()
        return trainers.used("second") >= 40

    first = trainers.start("first")
    trainers.until(goes_on)
    second = trainers.start("second")
    trainers.until(both_work)
    sink.close(30)
    assert sink.counters().written == count
    trainers.until(lambda: trainers.used("first", "second") >= count)
    for process in (first, second):
        trainers.finish(process)
    (one, _), (other, _) = trainers.outcome("first"), trainers.outcome("second")
    assert one.offsets.keys() & other.offsets.keys(), "nothing was handed over"
    assert one.counts.keys() | other.counts.keys() == {"admitted"}
    trained = sorted(one.known + other.known, key=lambda name: int(name[1:]))
    assert trained == [f"t{number}" for number in range(count)]
