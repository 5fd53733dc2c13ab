"""Real processes: ranks learn what one process learns, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import Manifest, Trace
from livedraft.traces.codec import encode
from livedraft.traces.spool import SpoolWriter
from livedraft.trainer.learner import LearnerState
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import Target, fresh_config
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

TraceMaker = Callable[..., Trace]
CHILD = Path(__file__).parent / "crash_child.py"


class Trainers:
    """Trainers of one spool."""

    def __init__(self, root: Path, target_folder: Path) -> None:
        self._root = root
        self._given = [sys.executable, str(CHILD), str(target_folder), str(root / "fresh"), str(root / "spool")]

    def write(self, traces: Sequence[Trace]) -> None:
        with SpoolWriter(self._root / "spool") as writer:
            for trace in traces:
                writer.append([encode(trace)])

    def drain(self, folder: str, ranks: int = 1, parallel: str = "ddp") -> None:
        """Learn in ``folder`` all there is."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # theirs, as torchrun holds it
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        world |= {"WORLD_SIZE": str(ranks)}
        command = [*self._given, str(self._root / folder), "drain", parallel]
        started = [subprocess.Popen(command, env=os.environ | world | {"RANK": str(rank)}) for rank in range(ranks)]
        assert [process.wait(100) for process in started] == [0] * ranks

    def outcome(self, folder: str) -> tuple[LearnerState, dict[str, Tensor]]:
        last = max((self._root / folder / "checkpoints").glob("step-*"))
        state = msgspec.msgpack.decode((last / "state.msgpack").read_bytes(), type=LearnerState)
        return state, load_file(last / "tensors.safetensors")


@pytest.fixture
def trainers(target: Target, target_folder: Path, tmp_path: Path) -> Trainers:
    drafter = Drafter.fresh(target, fresh_config(target))
    manifest = Manifest(tensors={}, target="tiny", target_revision="r", tokenizer_hash="h")
    checkpoint.write(tmp_path / "fresh", drafter.config, drafter.to_arrays(), manifest)
    return Trainers(tmp_path, target_folder)


def test_ranks_learn_what_one_process_learns_and_any_number_goes_on(
    trainers: Trainers, random_trace: TraceMaker
) -> None:
    """DDP, FSDP2 and one process in turn, in one folder; a trace that comes twice in between."""
    traces = [random_trace(n, domain="ab"[n > 10]) for n in range(24)]
    trainers.write(traces[:8])
    trainers.drain("ranks", 2, "ddp")
    trainers.write([*traces[8:16], traces[3]])
    trainers.drain("ranks", 2, "fsdp2")
    trainers.write(traces[16:])
    trainers.drain("ranks")
    trainers.drain("whole")
    found, tensors = trainers.outcome("ranks")
    expected, weights = trainers.outcome("whole")
    assert expected.steps > 25
    assert expected.counts.keys() == {"admitted", "held out", "duplicate"}
    # To rounding.
    rounded = {name: getattr(expected, name) for name in ("pace", "accept_length", "feature_rms", "excluded")}
    assert replace(found, **rounded) == expected
    assert found.accept_length == pytest.approx(expected.accept_length, rel=1e-5)
    assert found.pace.level == pytest.approx(expected.pace.level, rel=1e-5)
    assert tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
