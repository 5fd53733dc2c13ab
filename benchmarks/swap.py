"""Hot swaps under load: whether any failed, and the longest that a token waited for one."""

from __future__ import annotations

import itertools
import queue
import statistics
import tempfile
import time
from pathlib import Path

from livedraft.benchmarks.load import console, fresh_drafter, greedy, swap_to
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.contracts.messages import Delta
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.serving.local.engine import LocalEngine
from rich.progress import track

_TOKENS = 200
#: Requests kept running, and seconds between two swaps.
_AT_ONCE, _PAUSE_S = 8, 0.15


def swap(place: Path | None, target: str, threads: int, swaps: int) -> None:
    """See ``livedraft bench swap --help``."""
    times: dict[str, list[float]] = {}
    ended: queue.SimpleQueue[Delta] = queue.SimpleQueue()

    def emit(delta: Delta) -> None:
        times.setdefault(delta.request_id, []).append(time.perf_counter())
        if delta.finish_reason:
            ended.put(delta)

    exchanged: list[float] = []
    stalls: list[float] = []
    finished: list[Delta] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = EngineSettings(target=target, threads=threads, adaptive_depth=False)
        drafters = [fresh_drafter(settings, Path(folder) / str(seed), seed) for seed in range(2)]
        local = LocalEngine(settings, drafter=drafters[0])
        prompts = [local.render([{"role": "user", "content": text}]) for text in held_out_prompts()[:_AT_ONCE]]
        started = 0
        for number in track(range(swaps), description="swapping", console=console):
            while started - len(finished) < _AT_ONCE:
                local.submit(greedy(started, prompts[started % _AT_ONCE], _TOKENS), emit)
                started += 1
            time.sleep(_PAUSE_S)
            receipt = local.swap(swap_to(drafters[(number + 1) % 2], str(number + 1)))
            exchanged.append(time.perf_counter())
            stalls.append(receipt.stall_s)
            while not ended.empty():
                finished.append(ended.get())
        local.close(60)
        while not ended.empty():
            finished.append(ended.get())
    gaps = [(a, b - a) for line in times.values() for a, b in itertools.pairwise(line)]
    around = [gap for at, gap in gaps if any(at <= when <= at + gap for when in exchanged)]
    others = [gap for at, gap in gaps if not any(at <= when <= at + gap for when in exchanged)]
    normal = statistics.median(others)
    write(
        {
            "swaps": swaps,
            "failed": started - sum(delta.finish_reason == "length" for delta in finished),
            "requests": started,
            "max_token_delay_ms": round((max(around, default=normal) - normal) * 1e3, 2),
            "median_step_ms": round(normal * 1e3, 2),
            # The yardstick: how long a token waits on this machine when nothing is swapped, as often as not.
            "max_delay_without_swap_ms": round((max(others) - normal) * 1e3, 2),
            "p99_delay_without_swap_ms": round((statistics.quantiles(others, n=100)[98] - normal) * 1e3, 2),
            "max_stall_ms": round(max(stalls) * 1e3, 3),
            "provenance": provenance(),
        },
        place,
    )
