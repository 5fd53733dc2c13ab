"""A trainer process to be killed, in lockstep: ``crash_child.py TARGET DRAFTER SPOOL FOLDER drain|wait [ddp|fsdp2]``.

One rank of several where the environment says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import mkdtemp

from livedraft.contracts.settings import Trainer
from livedraft.contracts.stopping import stopping
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.traces.source import SpoolSource
from livedraft.trainer.dealt import DealtSource
from livedraft.trainer.process import main
from livedraft.trainer.ranks import joined

if __name__ == "__main__":
    target, drafter, spool, folder = map(Path, sys.argv[1:5])
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
    with stopping() as stop, joined(*sys.argv[6:7] or ["ddp"]) as ranks:
        main(
            settings,
            target_folder=target,
            drafter_folder=drafter,
            version="1",
            source=DealtSource(ranks, None if ranks.rank else SpoolSource(spool, "trainer")),
            registry=None if ranks.rank else MemoryRegistry(Path(mkdtemp(dir=folder.parent))),
            held_out=0.1,
            stop=stop,
            until_drained=sys.argv[5] == "drain",
            ranks=ranks,
        )
    ranks.leave()
