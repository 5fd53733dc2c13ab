"""Ranks of an engine in lockstep, as threads: what SGLang's loop and broadcast look like to the exchange."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from livedraft.contracts.errors import DrafterRejected
from livedraft.contracts.messages import SwapRequest
from livedraft.serving.sglang.exchange import Exchange
from livedraft.serving.sglang.identity import Drafting
from livedraft.serving.sglang.surface import BROADCAST, ROUND


class Staged(NamedTuple):
    version: str
    checksum: str


class FakeWeights:
    """Holds names of versions; fails where it is told to."""

    def __init__(self, **faults: Any) -> None:
        self.faults = faults
        self.settled = 0
        self.held, self.previous, self.copied = "a", "", ""

    def stage(self, request: SwapRequest) -> Staged:
        time.sleep(self.faults.get("stage_s", 0))
        if reason := self.faults.get("reject"):
            raise DrafterRejected(reason)
        if error := self.faults.get("stage"):
            raise error
        return Staged(request.version, request.checksum)

    def settle(self) -> None:
        self.settled += 1

    def apply(self, staged: Staged) -> None:
        self.copied = staged.version
        if error := self.faults.get("apply"):
            raise error

    def confirm(self) -> float:
        if (error := self.faults.get("confirm")) and self.copied != self.held:
            raise error
        return 0.5

    def restore(self) -> None:
        self.copied = self.held
        if error := self.faults.get("restore"):
            raise error

    def keep(self) -> None:
        self.previous, self.held = self.held, self.copied


class Ranks:
    """One thread per rank; every turn receives, then runs a batch when ``busy``."""

    def __init__(self, *weights: FakeWeights, busy: bool = True) -> None:
        self.weights = weights
        self.busy = busy
        self.draftings = [Drafting("a") for _ in weights]
        self.exchanges = [Exchange(drafting) for drafting in self.draftings]
        #: Per rank: (version stamped, version copied in) of each batch, and the requests that SGLang saw.
        self.batches: list[list[tuple[str, str]]] = [[] for _ in weights]
        self.requests: list[list[Any]] = [[] for _ in weights]
        self.incoming: list[Any] = []
        self._together = threading.Barrier(len(weights))
        self._values: list[Any] = [None] * len(weights)
        self._running = True
        self._busy_now = busy
        for rank, exchange in enumerate(self.exchanges):
            exchange.join(partial(self._gather, rank))
            exchange.connect(weights[rank])

    @contextmanager
    def turning(self) -> Iterator[Exchange]:
        """The leading rank's exchange, while the loops run."""
        threads = [threading.Thread(target=self._loop, args=(rank,)) for rank in range(len(self.weights))]
        for thread in threads:
            thread.start()
        try:
            yield self.exchanges[0]
        finally:
            self._running = False
            for thread in threads:
                thread.join()

    def _loop(self, rank: int) -> None:
        hooks = {hook.target: hook.around for hook in self.exchanges[rank].hooks}
        running = True
        while running:
            mine = [("running", self._running), *self.incoming] if rank == 0 else None
            received = hooks[BROADCAST](self._broadcast(rank), None, mine)
            assert all(isinstance(one, tuple) for one in received), "an order reached SGLang"
            running = received[0][1]
            self.requests[rank].extend(received[1:])
            if self.busy:
                hooks[ROUND](lambda worker, batch: self._batch(rank), None, "batch")

    def _batch(self, rank: int) -> None:
        self.batches[rank].append((self.draftings[rank].version, self.weights[rank].copied or "a"))

    def _broadcast(self, rank: int) -> Callable[..., Any]:
        return lambda receiver, requests: self._gather(rank, requests)[0]

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._together.wait()
        values = [*self._values]
        self._together.wait()
        time.sleep(0.0005)  # a batch takes its time, and other threads want theirs
        return values
