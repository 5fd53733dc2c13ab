"""Benchmarks of the local engine."""

from __future__ import annotations

import itertools
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.cli.wiring import write_fresh_drafter
from livedraft.contracts.messages import Delta, Generation, Sampling, SwapRequest
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.serving.local.engine import LocalEngine
from rich.console import Console
from rich.progress import track

_console = Console(stderr=True)
_TOKENS = 64


def engine(place: Path | None, target: str, threads: int, repeats: int) -> None:
    """See ``bench.engine``."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = LocalEngine(EngineSettings(target=target, threads=threads, draft_depth=0))
    model = AutoModelForCausalLM.from_pretrained(local.folder, dtype=torch.float32).eval()
    # One length for all, so that transformers pads nothing it would not have to.
    prompts = [local.encode(text)[:16] for text in held_out_prompts() if len(local.encode(text)) >= 16][:8]

    def transformers(batch: int) -> int:
        ids = torch.tensor(prompts[:batch])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=_TOKENS,
            min_new_tokens=_TOKENS,
            pad_token_id=0,
        )
        return int(out.shape[1] - ids.shape[1]) * batch

    def ours(batch: int) -> int:
        return sum(d.output_tokens for d in _run(local, _requests(prompts[:batch])))

    ratios, spread, speeds = {}, {}, {}
    for batch in (1, 8):
        sides: dict[str, Callable[[], int]] = {
            "transformers": partial(transformers, batch),
            "livedraft": partial(ours, batch),
        }
        rates = _interleave(sides, repeats)
        pairs = [a / b for a, b in zip(rates["livedraft"], rates["transformers"], strict=True)]
        ratios[str(batch)] = round(statistics.median(pairs), 3)
        spread[str(batch)] = [round(min(pairs), 3), round(max(pairs), 3)]
        speeds[str(batch)] = {name: round(statistics.median(r), 1) for name, r in rates.items()}
    local.close()
    write(
        {
            "ratio_over_transformers": ratios,
            "spread": spread,
            "tokens_per_second": speeds,
            "threads": threads,
            "provenance": provenance(),
        },
        place,
    )


def capture(place: Path | None, target: str, threads: int, repeats: int) -> None:
    """See ``bench.capture``."""
    from livedraft.contracts.settings import Traces
    from livedraft.traces.urls import open_sink

    with tempfile.TemporaryDirectory() as folder:
        settings = EngineSettings(target=target, threads=threads, adaptive_depth=False)
        drafter = _fresh(settings, Path(folder) / "drafter")
        sink = open_sink(Traces(url=f"spool://{folder}/traces"))
        local = LocalEngine(settings, drafter=drafter, sink=sink, admit=lambda request: request.traced)
        prompts = [local.render([{"role": "user", "content": text}]) for text in held_out_prompts()[:8]]

        def run(traced: bool) -> int:
            done = sum(d.output_tokens for d in _run(local, _requests(prompts, traced=traced)))
            return done

        rates = _interleave({"without": lambda: run(False), "with": lambda: run(True)}, repeats)
        local.close()
        sink.close()
        counters = sink.counters()
    pairs = [1 - a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    write(
        {
            "overhead": round(statistics.median(pairs), 4),
            "interquartile": [round(q, 4) for q in statistics.quantiles(pairs, n=4)[::2]],
            "tokens_per_second": {name: round(statistics.median(r), 1) for name, r in rates.items()},
            "traces": {"written": counters.written, "dropped": sum(counters.dropped.values())},
            "provenance": provenance(),
        },
        place,
    )


def swap(place: Path | None, target: str, threads: int, swaps: int) -> None:
    """See ``bench.swap``."""
    with tempfile.TemporaryDirectory() as folder:
        settings = EngineSettings(target=target, threads=threads, adaptive_depth=False)
        drafters = [_fresh(settings, Path(folder) / str(seed), seed) for seed in range(2)]
        local = LocalEngine(settings, drafter=drafters[0])
        prompts = [local.render([{"role": "user", "content": text}]) for text in held_out_prompts()[:8]]
        times: dict[str, list[float]] = {}
        ended: queue.SimpleQueue[Delta] = queue.SimpleQueue()

        def emit(delta: Delta) -> None:
            times.setdefault(delta.request_id, []).append(time.perf_counter())
            if delta.finish_reason:
                ended.put(delta)

        running = started = failed = tokens = 0
        exchanged: list[float] = []
        stalls: list[float] = []
        for number in track(range(swaps), description="swapping", console=_console):
            while running < len(prompts):
                request = _requests([prompts[started % len(prompts)]], length=200)[0]
                local.submit(_named(request, str(started)), emit)
                started, running = started + 1, running + 1
            time.sleep(0.15)
            folder_ = drafters[(number + 1) % 2]
            receipt = local.swap(SwapRequest(path=str(folder_), version=str(number + 1), checksum=_checksum(folder_)))
            exchanged.append(time.perf_counter())
            stalls.append(receipt.stall_s)
            while not ended.empty():
                delta = ended.get()
                running -= 1
                tokens += delta.output_tokens
                failed += delta.finish_reason != "length"
        local.close(60)
        while not ended.empty():
            delta = ended.get()
            failed += delta.finish_reason != "length"
    gaps = [(a, b - a) for line in times.values() for a, b in itertools.pairwise(line)]
    normal = statistics.median(gap for _, gap in gaps)
    around = [gap for at, gap in gaps if any(at <= when <= at + gap for when in exchanged)]
    write(
        {
            "swaps": swaps,
            "failed": failed,
            "max_token_delay_ms": round((max(around, default=normal) - normal) * 1e3, 2),
            "median_step_ms": round(normal * 1e3, 2),
            "longest_step_without_swap_ms": round(
                max(gap for at, gap in gaps if not any(at <= when <= at + gap for when in exchanged)) * 1e3, 2
            ),
            "max_stall_ms": round(max(stalls) * 1e3, 3),
            "provenance": provenance(),
        },
        place,
    )


def _interleave(sides: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each side, ``repeats`` times in turn after one unmeasured turn."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in track(range(repeats + 1), description=" / ".join(sides), console=_console):
        # Alternate who goes first: caches and clocks favour the second.
        for name in list(sides) if turn % 2 else list(reversed(sides)):
            started = time.perf_counter()
            tokens = sides[name]()
            if turn:
                rates[name].append(tokens / (time.perf_counter() - started))
    return rates


def _requests(prompts: Sequence[Sequence[int]], *, traced: bool = False, length: int = _TOKENS) -> list[Generation]:
    return [
        Generation(
            request_id=f"bench-{i}",
            prompt=tuple(prompt),
            sampling=Sampling(temperature=0),
            max_tokens=length,
            ignore_eos=True,
            traced=traced,
        )
        for i, prompt in enumerate(prompts)
    ]


def _named(request: Generation, name: str) -> Generation:
    import msgspec

    return msgspec.structs.replace(request, request_id=name)


def _run(engine: LocalEngine, requests: Sequence[Generation]) -> list[Delta]:
    ended: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    for request in requests:
        engine.submit(request, lambda delta: ended.put(delta) if delta.finish_reason else None)
    return [ended.get() for _ in requests]


def _checksum(folder: Path) -> str:
    from livedraft.contracts import checkpoint

    return checkpoint.checksum(checkpoint.verify(folder)[1].tensors)


def _fresh(settings: EngineSettings, folder: Path, seed: int = 0) -> Path:
    write_fresh_drafter(settings, folder, seed)
    return folder
