"""One rank of two, over gloo: `python rank_process.py RANK FILE` turns a loop like SGLang's and prints its batches.

The broadcast and the gathering are torch's collectives on a process group, as in an engine with tensor parallelism.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist
from livedraft.contracts.errors import LivedraftError
from livedraft.contracts.messages import SwapRequest
from livedraft.serving.sglang.exchange import Exchange
from livedraft.serving.sglang.identity import Drafting
from livedraft.serving.sglang.plugin import collective
from livedraft.serving.sglang.surface import BROADCAST, ROUND

from tests.serving.sglang.ranks import FakeWeights


def broadcast(receiver: Any, requests: list[Any] | None) -> list[Any]:
    """Size, then bytes, from rank 0: SGLang's ``broadcast_pyobj``."""
    data = pickle.dumps(requests)
    size = torch.tensor([len(data)])
    dist.broadcast(size, src=0)
    content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if requests is not None else None
    content = content if content is not None else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, src=0)
    received: list[Any] = pickle.loads(content.numpy().tobytes())
    return received


def main(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    weights, drafting = FakeWeights(stage_s=0.05 * rank), Drafting("a")
    exchange = Exchange(drafting)
    own_rank, gather = collective(dist.group.WORLD)
    assert own_rank == rank
    exchange.join(gather)
    exchange.connect(weights)
    hooks = {hook.target: hook.around for hook in exchange.hooks}
    done = threading.Event()
    answers: list[str] = []

    def ask() -> None:
        for version, fault in (("b", {}), ("c", {"reject": "no good"}), ("d", {})):
            weights.faults |= fault
            try:
                answers.append(exchange.swap(SwapRequest(path="/", version=version, checksum=version)).version)
            except LivedraftError as error:
                answers.append(f"{type(error).__name__}: {error}")
            weights.faults.pop("reject", None)
        done.set()

    if rank == 0:
        threading.Thread(target=ask, daemon=True).start()
    batches: list[tuple[str, str]] = []
    running = True
    while running:
        received = hooks[BROADCAST](broadcast, None, [not done.is_set()] if rank == 0 else None)
        running = received[0]
        hooks[ROUND](lambda worker, batch: batches.append((drafting.version, weights.copied or "a")), None, None)
    dist.destroy_process_group()
    print(json.dumps({"answers": answers, "batches": batches, "held": weights.held}))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
