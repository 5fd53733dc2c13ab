"""Drive an engine from a test."""

from __future__ import annotations

import queue
from collections.abc import Sequence

from livedraft.contracts.messages import Delta, Generation
from livedraft.contracts.ports import Engine


class Client:
    """Submits generations and gathers what comes back, by request id."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.deltas: dict[str, list[Delta]] = {}
        self.ended: queue.Queue[str] = queue.Queue()

    def submit(self, request: Generation) -> None:
        self.deltas[request.request_id] = []
        self.engine.submit(request, self._emit)

    def _emit(self, delta: Delta) -> None:
        self.deltas[delta.request_id].append(delta)
        if delta.finish_reason:
            self.ended.put(delta.request_id)

    def run(self, requests: Sequence[Generation], concurrency: int = 8) -> list[list[int]]:
        """Output tokens of each request, at most ``concurrency`` in the engine at a time."""
        for i, request in enumerate(requests):
            if i >= concurrency:
                self.ended.get(timeout=120)
            self.submit(request)
        for _ in range(min(concurrency, len(requests))):
            self.ended.get(timeout=120)
        return [self.tokens(r.request_id) for r in requests]

    def tokens(self, request_id: str) -> list[int]:
        return [t for d in self.deltas[request_id] for t in d.tokens]

    def text(self, request_id: str) -> str:
        return "".join(d.text for d in self.deltas[request_id])

    def last(self, request_id: str) -> Delta:
        return self.deltas[request_id][-1]
