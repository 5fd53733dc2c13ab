"""A trainer killed at any moment and started again ends with the weights of one that never died."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from livedraft.contracts.messages import Trace
from livedraft.traces.codec import encode
from livedraft.traces.spool import SpoolWriter
from livedraft.trainer.loop import Progress
from safetensors.torch import load_file
from torch import Tensor

TraceMaker = Callable[..., Trace]
CHILD = Path(__file__).parent / "crash_child.py"


@pytest.fixture
def spool(random_trace: TraceMaker, tmp_path: Path) -> Path:
    """40 records, one of them delivered twice."""
    traces = [random_trace(n, domain="ab"[n > 20]) for n in range(40)]
    with SpoolWriter(tmp_path / "spool") as writer:
        for trace in [*traces, traces[30]]:
            writer.append([encode(trace)])
    return tmp_path / "spool"


def start(target: Path, spool: Path, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(CHILD), str(target), str(spool), str(folder)])


def outcome(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    last = max((folder / "checkpoints").glob("step-*"))
    return msgspec.json.decode((folder / "progress.json").read_bytes(), type=Progress), load_file(
        last / "tensors.safetensors"
    )


def test_kill_and_restart_is_as_if_nothing_happened(target_folder: Path, spool: Path, tmp_path: Path) -> None:
    assert start(target_folder, spool, tmp_path / "whole").wait(100) == 0
    expected, tensors = outcome(tmp_path / "whole")
    assert expected.counts["duplicate"] == 1
    assert expected.counts["held out"] > 0
    assert expected.steps > 40

    rng, kills = random.Random(0), 0
    while True:
        child = start(target_folder, spool, tmp_path / "killed")
        # Not before it learns: importing torch takes seconds, in which nothing can go wrong.
        checkpoints = tmp_path / "killed" / "checkpoints"
        before = set(checkpoints.glob("step-*"))
        while child.poll() is None and not set(checkpoints.glob("step-*")) - before:
            time.sleep(0.002)
        if kills < 5:
            time.sleep(rng.uniform(0, 0.25))
            child.kill()
        kills += child.wait(100) != 0
        if child.returncode == 0:
            break
    assert kills >= 3
    found, weights = outcome(tmp_path / "killed")
    assert found.offsets == expected.offsets
    assert found.counts == expected.counts
    assert (found.steps, found.tokens) == (expected.steps, expected.tokens)
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, weights[name]), name
