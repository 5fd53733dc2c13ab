"""``livedraft trainer`` under torchrun: two ranks on one stream, one of them killed, and both told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from livedraft.cli import wiring
from livedraft.cli.settings_file import write_settings
from livedraft.contracts.settings import Engine, Kafka, Registry, Settings, Traces
from livedraft.traces.codec import encode
from livedraft.traces.groups import GroupOffsets
from livedraft.traces.spool import SpoolWriter
from livedraft.traces.urls import open_sink, open_source
from livedraft.trainer.learner import LearnerState
from livedraft.trainer.loop import Progress
from msgspec.structs import replace

from .lockstep import LOCKSTEP, TraceMaker

COUNT = 40


def settings_of(folder: Path, url: str, parallel: str) -> Settings:
    """A checkpoint after each turn."""
    return Settings(
        engine=Engine(draft_intermediate=64),
        traces=Traces(url=url, held_out=0.0),
        kafka=Kafka(prefix=f"e2e-{uuid.uuid4().hex[:8]}", partitions=3),
        registry=Registry(url="memory:"),
        trainer=replace(LOCKSTEP, folder=str(folder / "trainer"), parallel=parallel, checkpoint_every_s=0.0),
    )


class Launched:
    """Two ranks, started again together when one of them dies."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        config = write_settings(settings, folder / "livedraft.toml")
        self._folder = folder
        self._command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
        self._command += ["-m", "livedraft.cli.main", "trainer", "--config", str(config)]

    def __enter__(self) -> Launched:
        with (self._folder / "log").open("wb") as log:
            self._launcher = subprocess.Popen(
                [sys.executable, *self._command],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                preexec_fn=wiring.leave_with_parent,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._launcher.kill()
        self._launcher.wait()

    def until_used(self, count: int) -> None:
        """So many deliveries are in a checkpoint, which is named by them."""
        self._until(lambda: (found := self._last()) is not None and int(found.name.split("-")[2]) >= count)

    def kill(self, rank: int) -> Callable[[], None]:
        """SIGKILL; what is returned waits for the one in its place."""
        killed = self._worker(rank)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        return lambda: self._until(lambda: self._worker(rank) not in (None, killed))

    def stop(self) -> LearnerState:
        """As an operator does it; what they leave."""
        self._launcher.terminate()
        self._launcher.wait(60)
        found = self._last()
        assert found is not None
        return msgspec.msgpack.decode((found / "state.msgpack").read_bytes(), type=LearnerState)

    @property
    def progress(self) -> Progress:
        return msgspec.json.decode((self._folder / "trainer" / "progress.json").read_bytes(), type=Progress)

    def _last(self) -> Path | None:
        return max((self._folder / "trainer" / "checkpoints").glob("step-*"), default=None)

    def _worker(self, rank: int) -> int | None:
        """Process id of a rank, found by its environment."""
        launcher = self._launcher.pid
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            with contextlib.suppress(OSError):  # it has just died
                if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    return int(child)
        return None

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert self._launcher.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.01)


def test_a_rank_is_killed_and_all_go_on_from_the_checkpoint_until_they_are_told_to_stop(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, f"spool://{tmp_path}/traces", "fsdp2")
    make_trace = TraceMaker(settings, tmp_path)
    messages = [encode(make_trace(number)) for number in range(COUNT)]
    with SpoolWriter(tmp_path / "traces") as spool:
        for message in messages[: COUNT // 2]:
            spool.append([message])
        with Launched(settings, tmp_path) as ranks:
            ranks.until_used(COUNT // 4)
            until_replaced = ranks.kill(1)
            for message in messages[COUNT // 2 :]:
                spool.append([message])
            until_replaced()
            ranks.until_used(COUNT)
            state = ranks.stop()
    assert state.counts == {"admitted": COUNT}
    assert (state.steps, state.offsets) == (COUNT // 2, {"0": COUNT})
    assert sorted(state.known) == sorted(f"t{number}" for number in range(COUNT))
    assert GroupOffsets(tmp_path / "traces", "trainer").load() == {"0": COUNT}
    assert ranks.progress.steps == COUNT // 2  # the last thing that a rank does which was not killed itself
    assert ranks.progress.published is not None


# kafka-python leaves the sockets of failed connections to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ranks_share_the_partitions_of_a_broker_and_no_trace_is_trained_on_twice(
    broker_address: str, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, f"kafka://{broker_address}", "ddp")
    make_trace = TraceMaker(settings, tmp_path)
    sink = open_sink(settings.traces, kafka=settings.kafka)
    assert all(sink.offer(make_trace(number)) for number in range(COUNT // 2))
    with Launched(settings, tmp_path) as ranks:
        ranks.until_used(COUNT // 4)
        until_replaced = ranks.kill(1)
        assert all(sink.offer(make_trace(number)) for number in range(COUNT // 2, COUNT))
        until_replaced()
        ranks.until_used(COUNT)
        state = ranks.stop()
    sink.close(30)
    assert sink.counters().written == COUNT
    assert state.counts == {"admitted": COUNT}
    assert state.steps == COUNT // 2
    assert sorted(state.known) == sorted(f"t{number}" for number in range(COUNT))
    names = {f"{settings.kafka.prefix}.traces/{number}" for number in range(3)}
    assert (set(state.offsets), sum(state.offsets.values())) == (names, COUNT)
    with contextlib.closing(open_source(settings.traces, "trainer", settings.kafka, share=(0, 1))) as source:
        assert source.committed() == state.offsets
    assert ranks.progress.offsets == state.offsets
