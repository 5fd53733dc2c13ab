"""A trainer process to be killed: ``crash_child.py TARGET_FOLDER SPOOL FOLDER``, learns in lockstep until drained."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from tempfile import mkdtemp

import torch
from livedraft.contracts.settings import Trainer
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.traces.source import SpoolSource
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.loop import run
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import fresh_config, read_target


def main(target_folder: Path, spool: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    target = read_target(target_folder)
    settings = Trainer(
        folder=str(folder),
        steps_per_trace=1.5,
        batch_traces=4,
        replay_traces=16,
        unroll=3,
        discard=0.1,
        window=16,
        nice=0,
        checkpoint_every_s=0.0,
        publish_every_s=0.05,
        precision="float32",
    )
    learner = Learner(
        Drafter.fresh(target, fresh_config(target)),
        TargetId(target="tiny", target_revision="r", tokenizer_hash="h"),
        settings,
        held_out=0.1,
    )
    registry = MemoryRegistry(Path(mkdtemp(dir=folder.parent)))
    run(learner, SpoolSource(spool, "trainer"), registry, settings, threading.Event(), until_drained=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
