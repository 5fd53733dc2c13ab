"""The demo's comparison: no speculation, the drafter frozen at the shift, the live one; interleaved in one run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from livedraft.cli.traffic import TEMPERATURES, TOKENS, Served
from livedraft.contracts.messages import Delta, Generation, Sampling
from livedraft.contracts.settings import Settings
from livedraft.serving.local.engine import LocalEngine
from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

SIDES = ("no_speculation", "static", "live")
#: Prompts served greedily during the run whose answers are made again without speculation.
CHECKED = 240
#: Share of the time for each temperature; the rest is for checking served answers.
_SHARE = 0.42
#: Prompts that warm every side up; and the fewest measured, and batches checked, however little time is left.
_WARM_UP, _LEAST = 4, 6


@dataclass(slots=True)
class Comparison:
    """Everything measured by (side, temperature); a row per prompt, in the same order on every side."""

    #: Tokens per second.
    rates: dict[tuple[str, float], list[float]] = field(default_factory=dict)
    #: (committed tokens, verify rounds).
    rounds: dict[tuple[str, float], list[tuple[int, int]]] = field(default_factory=dict)
    checked: int = 0
    mismatches: int = 0

    def accept_length(self, side: str, temperature: float) -> float:
        """Over all prompts, bonus included."""
        tokens, rounds = (sum(column) for column in zip(*self.rounds[side, temperature], strict=True))
        return tokens / rounds if rounds else 1.0


def compare(
    settings: Settings,
    served: Sequence[Served],
    prompts: Sequence[str],
    day_0: Path,
    static: Path,
    live: Path,
    stop: threading.Event,
    console: Console,
    *,
    seconds: float,
) -> Comparison:
    """Batch 1, every prompt on every side in turn, first at temperature 0, then 0.7; then the greedy answers again.

    As many prompts as about ``seconds`` allow.
    """
    found = Comparison()
    quiet = replace(settings.engine, draft_depth=0)
    engines = {
        "no_speculation": LocalEngine(quiet),
        "static": LocalEngine(settings.engine, drafter=static, drafter_version="static"),
        "live": LocalEngine(settings.engine, drafter=live, drafter_version="live"),
        "day0": LocalEngine(settings.engine, drafter=day_0, drafter_version="day0"),
    }
    try:
        started = time.monotonic()
        for number, temperature in enumerate(TEMPERATURES):
            until = started + (number + 1) * _SHARE * seconds
            _interleave(engines, prompts, temperature, found, until, stop, console)
        _check(engines["no_speculation"], served, found, started + seconds, stop, console)
    finally:
        for engine in engines.values():
            engine.close()
    return found


def _interleave(
    engines: dict[str, LocalEngine],
    prompts: Sequence[str],
    temperature: float,
    found: Comparison,
    until: float,
    stop: threading.Event,
    console: Console,
) -> None:
    for number, text in enumerate(
        track(prompts, description=f"comparing, temperature {temperature:g}", console=console)
    ):
        if number >= _WARM_UP + _LEAST and time.monotonic() > until:
            return
        sides = list(engines) if number % 2 else list(reversed(engines))
        outputs: dict[str, list[int]] = {}
        for side in sides:
            if stop.is_set():
                return
            if side == "day0" and number >= 2 * _WARM_UP:
                continue
            started = time.perf_counter()
            tokens, last = _generate(engines[side], [text], temperature, seed=number)[0]
            seconds = time.perf_counter() - started
            outputs[side] = tokens
            if number >= _WARM_UP or side == "day0":
                found.rates.setdefault((side, temperature), []).append(len(tokens) / seconds)
                found.rounds.setdefault((side, temperature), []).append((last.output_tokens - 1, last.rounds))
        if temperature == 0:
            found.checked += len(outputs) - 1
            found.mismatches += sum(o != outputs["no_speculation"] for o in outputs.values())


def _check(
    engine: LocalEngine,
    served: Sequence[Served],
    found: Comparison,
    until: float,
    stop: threading.Event,
    console: Console,
) -> None:
    """What was served greedily, through swaps and all, against the target alone."""
    greedy = [s for s in served if s.temperature == 0]
    chosen = greedy[:: max(1, len(greedy) // CHECKED)][:CHECKED]
    for at in track(range(0, len(chosen), 8), description="checking served answers", console=console):
        if stop.is_set() or (at >= 8 * _LEAST and time.monotonic() > until):
            return
        batch = chosen[at : at + 8]
        again = _generate(engine, [s.prompt for s in batch], 0.0, seed=0)
        found.checked += len(batch)
        found.mismatches += sum(engine.decode(a[0]) != s.text for a, s in zip(again, batch, strict=True))


def _generate(
    engine: LocalEngine, texts: Sequence[str], temperature: float, seed: int
) -> list[tuple[list[int], Delta]]:
    """Output tokens and last Delta of each prompt, run together."""
    deltas: dict[str, list[int]] = {str(i): [] for i in range(len(texts))}
    ended: queue.SimpleQueue[Delta] = queue.SimpleQueue()

    def emit(delta: Delta) -> None:
        deltas[delta.request_id] += delta.tokens
        if delta.finish_reason:
            ended.put(delta)

    for i, text in enumerate(texts):
        prompt = tuple(engine.render([{"role": "user", "content": text}]))
        engine.submit(
            Generation(
                request_id=str(i),
                prompt=prompt,
                sampling=Sampling(temperature=temperature, seed=seed),
                max_tokens=TOKENS,
                ignore_eos=True,
            ),
            emit,
        )
    last = {d.request_id: d for d in (ended.get() for _ in texts)}
    return [(deltas[str(i)], last[str(i)]) for i in range(len(texts))]
