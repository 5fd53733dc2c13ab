"""What the benchmarks of an engine share: requests, sides measured in turn, drafters made on the spot."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from livedraft.cli.wiring import write_fresh_drafter
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import Delta, Generation, Sampling, SwapRequest
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.serving.local.engine import LocalEngine
from rich.console import Console
from rich.progress import track

#: Progress goes to standard error, so that ``--json -`` can be piped.
console = Console(stderr=True)


def interleave(sides: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each side, ``repeats`` times in turn after one unmeasured turn."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in track(range(repeats + 1), description=" / ".join(sides), console=console):
        # Alternate who goes first: caches and clocks favour the second.
        for name in list(sides) if turn % 2 else list(reversed(sides)):
            started = time.perf_counter()
            tokens = sides[name]()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - started))
    return rates


def greedy(number: int, prompt: Sequence[int], length: int, *, traced: bool = False, domain: str = "") -> Generation:
    """A greedy request of exactly ``length`` output tokens."""
    return Generation(
        request_id=f"bench-{number}",
        prompt=tuple(prompt),
        sampling=Sampling(temperature=0),
        max_tokens=length,
        ignore_eos=True,
        traced=traced,
        domain=domain or "default",
    )


def answers(engine: LocalEngine, requests: Sequence[Generation], at_once: int = 8) -> Iterator[tuple[list[int], Delta]]:
    """Output tokens and last Delta of each request in order, with at most ``at_once`` in the engine."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    last: dict[str, Delta] = {}
    ended: queue.SimpleQueue[Delta] = queue.SimpleQueue()

    def emit(delta: Delta) -> None:
        tokens[delta.request_id] += delta.tokens
        if delta.finish_reason:
            ended.put(delta)

    waiting = iter(requests)
    for request in itertools.islice(waiting, at_once):
        engine.submit(request, emit)
    for wanted in requests:
        while wanted.request_id not in last:
            delta = ended.get()
            last[delta.request_id] = delta
            if (following := next(waiting, None)) is not None:
                engine.submit(following, emit)
        yield tokens[wanted.request_id], last[wanted.request_id]


def fresh_drafter(settings: EngineSettings, folder: Path, seed: int = 0) -> Path:
    """A drafter that knows nothing, in ``folder``."""
    write_fresh_drafter(settings, folder, seed)
    return folder


def swap_to(folder: Path, version: str) -> SwapRequest:
    """The order to draft with the checkpoint in ``folder``."""
    _, manifest = checkpoint.verify(folder)
    return SwapRequest(path=str(folder), version=version, checksum=checkpoint.checksum(manifest.tensors))
