"""Real processes: a trainer killed at any moment goes on as one that never died; one that is told to stop, stops."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import Manifest, Trace
from livedraft.traces.codec import encode
from livedraft.traces.spool import SpoolWriter
from livedraft.trainer.loop import Progress
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import Target, fresh_config
from safetensors.torch import load_file
from torch import Tensor

TraceMaker = Callable[..., Trace]
Start = Callable[[str, str], "subprocess.Popen[bytes]"]
CHILD = Path(__file__).parent / "crash_child.py"


@pytest.fixture
def start(random_trace: TraceMaker, target: Target, target_folder: Path, tmp_path: Path) -> Start:
    """Starts a trainer in a named folder, on 40 traces of two domains, one of them delivered twice."""
    traces = [random_trace(n, domain="ab"[n > 20]) for n in range(40)]
    with SpoolWriter(tmp_path / "spool") as writer:
        for trace in [*traces, traces[30]]:
            writer.append([encode(trace)])
    drafter = Drafter.fresh(target, fresh_config(target))
    manifest = Manifest(tensors={}, target="tiny", target_revision="r", tokenizer_hash="h")
    checkpoint.write(tmp_path / "fresh", drafter.config, drafter.to_arrays(), manifest)
    given = [sys.executable, str(CHILD), str(target_folder), str(tmp_path / "fresh"), str(tmp_path / "spool")]
    return lambda folder, mode: subprocess.Popen([*given, str(tmp_path / folder), mode])


def outcome(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    last = max((folder / "checkpoints").glob("step-*"))
    progress = msgspec.json.decode((folder / "progress.json").read_bytes(), type=Progress)
    return progress, load_file(last / "tensors.safetensors")


def wait_for_checkpoint(folder: Path, child: subprocess.Popen[bytes]) -> None:
    """Until the child writes its first one: before that it imports torch for seconds, and nothing can go wrong."""
    before = set(folder.glob("checkpoints/step-*"))
    while child.poll() is None and not set(folder.glob("checkpoints/step-*")) - before:
        time.sleep(0.002)


def test_kill_and_restart_is_as_if_nothing_happened(start: Start, tmp_path: Path) -> None:
    assert start("whole", "drain").wait(100) == 0
    expected, tensors = outcome(tmp_path / "whole")
    assert expected.counts["duplicate"] == 1
    assert expected.counts["held out"] > 0
    assert expected.steps > 40

    rng, kills, child = random.Random(0), 0, start("killed", "drain")
    while kills < 4:
        wait_for_checkpoint(tmp_path / "killed", child)
        time.sleep(rng.uniform(0, 0.25))
        child.kill()
        if child.wait(100) == 0:
            break
        kills, child = kills + 1, start("killed", "drain")
    assert child.wait(100) == 0
    assert kills >= 3
    found, weights = outcome(tmp_path / "killed")
    assert found.offsets == expected.offsets
    assert found.counts == expected.counts
    assert (found.steps, found.tokens) == (expected.steps, expected.tokens)
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, weights[name]), name


def test_sigterm_ends_a_waiting_trainer_cleanly(start: Start, tmp_path: Path) -> None:
    child = start("told", "wait")
    progress = tmp_path / "told" / "progress.json"
    wait_for_checkpoint(tmp_path / "told", child)
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 0
    found = msgspec.json.decode(progress.read_bytes(), type=Progress)
    assert f"{found.steps:010d}" in max((tmp_path / "told" / "checkpoints").glob("step-*")).name
