"""``livedraft trainer`` under torchrun: two ranks on a spool, one of them killed, and both told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from livedraft.cli import wiring
from livedraft.cli.settings_file import write_settings
from livedraft.contracts.settings import Engine, Registry, Settings, Traces
from livedraft.traces.codec import encode
from livedraft.traces.groups import GroupOffsets
from livedraft.traces.spool import SpoolWriter
from livedraft.trainer.learner import LearnerState
from livedraft.trainer.loop import Progress
from msgspec.structs import replace

from .lockstep import LOCKSTEP, TraceMaker

COUNT = 40


def worker(launcher: int, rank: int) -> int | None:
    """Process id of a rank, found by its environment."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has just died
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    return None


def test_a_rank_is_killed_and_all_go_on_from_the_checkpoint_until_they_are_told_to_stop(tmp_path: Path) -> None:
    settings = Settings(
        engine=Engine(draft_intermediate=64),
        traces=Traces(url=f"spool://{tmp_path}/traces", held_out=0.0),
        registry=Registry(url="memory:"),
        trainer=replace(LOCKSTEP, folder=str(tmp_path / "trainer"), parallel="fsdp2", checkpoint_every_s=0.0),
    )
    config = write_settings(settings, tmp_path / "livedraft.toml")
    make_trace = TraceMaker(settings, tmp_path)
    messages = [encode(make_trace(number)) for number in range(COUNT)]
    spool = SpoolWriter(tmp_path / "traces")
    for message in messages[: COUNT // 2]:
        spool.append([message])

    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["-m", "livedraft.cli.main", "trainer", "--config", str(config)]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=wiring.leave_with_parent,
        )

    def last() -> Path | None:
        return max((tmp_path / "trainer" / "checkpoints").glob("step-*"), default=None)

    def used(count: int) -> bool:
        found = last()
        return found is not None and int(found.name.split("-")[2]) >= count

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert launcher.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)

    try:
        until(lambda: used(COUNT // 4))
        killed = worker(launcher.pid, 1)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        for message in messages[COUNT // 2 :]:
            spool.append([message])
        until(lambda: worker(launcher.pid, 1) not in (None, killed))
        until(lambda: used(COUNT))
        launcher.terminate()
        launcher.wait(60)
    finally:
        launcher.kill()
        launcher.wait()
    spool.close()
    found = last()
    assert found is not None
    state = msgspec.msgpack.decode((found / "state.msgpack").read_bytes(), type=LearnerState)
    assert state.counts == {"admitted": COUNT}
    assert (state.steps, state.offsets) == (COUNT // 2, {"0": COUNT})
    assert sorted(state.known) == sorted(f"t{number}" for number in range(COUNT))
    assert GroupOffsets(tmp_path / "traces", "trainer").load() == {"0": COUNT}
    progress = msgspec.json.decode((tmp_path / "trainer" / "progress.json").read_bytes(), type=Progress)
    assert progress.steps == COUNT // 2  # the last thing that a rank does which was not killed itself
    assert progress.published is not None
