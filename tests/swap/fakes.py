"""Hand-made neighbours of the swap controller: an engine, a replay, traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import (
    Array,
    EngineStatus,
    Features,
    ReplayScore,
    Rounds,
    Sampling,
    SwapReceipt,
    SwapRequest,
    Trace,
)


def array(values: Sequence[int], dtype: str = "<i4") -> Array:
    flat = np.array(values, dtype)
    return Array(dtype="i4", shape=flat.shape, data=flat.tobytes())


def trace(
    number: int,
    *,
    request_id: str | None = None,
    target: str = "tiny",
    finished_at: float = 1000.0,
    drafter: str = "1",
    domain: str = "prose",
    tokens: int = 20,
    rounds: int = 10,
) -> Trace:
    none = array([])
    return Trace(
        trace_id=f"t{number}",
        request_id=request_id or f"r{number}",
        engine="fake",
        target=target,
        target_revision="r1",
        tokenizer_hash="tok",
        drafters=(drafter,),
        started_at=finished_at - 1,
        finished_at=finished_at,
        sampling=Sampling(),
        top_temperature=1.0,
        finish_reason="stop",
        prompt=array([1, 2]),
        output=array(range(tokens)),
        rounds=Rounds(
            root=array(range(rounds)),
            size=none,
            drafter=none,
            tokens=none,
            parents=none,
            logprobs=none,
            accepted=none,
            bonus=none,
            top_ids=none,
            top_logprobs=none,
            tail=none,
        ),
        features=Features(),
        domain=domain,
    )


class FakeEngine:
    """Drafts with whatever it was given; ``serve`` moves its counters as traffic would."""

    def __init__(self, folder: Path, version: str) -> None:
        self.broken = False
        self.refuses: set[str] = set()
        self.history = [version]
        self._rounds = 0
        self._counters: dict[str, tuple[int, int]] = {}
        #: Requests by version; it counts none until some are given.
        self.requests: dict[str, int] = {}
        self._take(folder, version)

    def _take(self, folder: Path, version: str) -> None:
        tensors = checkpoint.hash_tensors(checkpoint.load(folder))
        self.drafter, self.checksum = version, checkpoint.checksum(tensors)

    def restart(self, folder: Path, version: str) -> None:
        self._counters.clear()
        self._rounds = 0
        self._take(folder, version)

    def serve(self, rounds: int, accept_length: float) -> None:
        tokens, before = self._counters.get(self.drafter, (0, 0))
        self._counters[self.drafter] = (tokens + round(rounds * accept_length), before + rounds)
        self._rounds += rounds

    def serve_undrafted(self, rounds: int) -> None:
        """Traffic for which the engine does not draft to the full."""
        self._rounds += rounds

    def status(self) -> EngineStatus:
        if self.broken:
            raise SwapFailed("the engine does not answer")
        return EngineStatus(
            engine="fake",
            target="tiny",
            target_revision="r1",
            tokenizer_hash="tok",
            context_length=64,
            drafter=self.drafter,
            drafter_checksum=self.checksum,
            running=0,
            waiting=0,
            output_tokens=0,
            rounds=self._rounds,
            by_drafter=dict(self._counters),
            requests_by_drafter=dict(self.requests),
        )

    def swap(self, request: SwapRequest) -> SwapReceipt:
        if self.broken:
            raise SwapFailed("the engine does not answer")
        if request.version in self.refuses:
            raise DrafterRejected(f"version {request.version}: not for me")
        previous = self.drafter
        self._take(Path(request.path), request.version)
        self.history.append(request.version)
        return SwapReceipt(
            version=request.version, checksum=self.checksum, previous=previous, applied_at=1.0, stall_s=0.001
        )


class FakeReplay:
    """Scores by table: accept length by version, which is the folder's name."""

    def __init__(self, accept_length: dict[str, float]) -> None:
        self.accept_length = accept_length
        #: By version: by what share traces differ, up and down in turn.
        self.scatter: dict[str, float] = {}
        self.asked: list[tuple[str, list[str]]] = []

    def score(self, folder: Path, traces: Sequence[Trace]) -> list[ReplayScore]:
        self.asked.append((folder.name, [t.trace_id for t in traces]))
        return [
            ReplayScore(
                trace_id=t.trace_id,
                domain=t.domain,
                temperature=1.0,
                tokens=20.0,
                rounds=20.0 / self.accept_length[folder.name] * (1 + (-1) ** i * self.scatter.get(folder.name, 0.0)),
            )
            for i, t in enumerate(traces)
        ]
