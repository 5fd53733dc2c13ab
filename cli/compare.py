"""The demo's comparison: no speculation, the drafter frozen at the shift, the live one; interleaved in one run.

Speed is measured as served, with the draft depth that the engine chooses by goodput.  What a drafter is worth is
measured apart, drafting to the full in every round: a depth chosen for speed says little of a drafter that is not used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from livedraft.benchmarks.load import answers
from livedraft.cli.traffic import TEMPERATURES, TOKENS, Served
from livedraft.contracts.messages import Delta, Generation, Sampling
from livedraft.contracts.settings import Settings
from livedraft.serving.local.engine import LocalEngine
from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

SIDES = ("no_speculation", "static", "live")
DRAFTERS = ("day0", "static", "live")
#: Prompts served greedily during the run whose answers are made again without speculation.
CHECKED = 240
#: Shares of the time until each part ends: speed at either temperature, then accept lengths, then served answers.
_SPEED, _ACCEPT = (0.33, 0.66), 0.84
#: Prompts that warm every side up; and the fewest measured, and batches checked, however little time is left.
_WARM_UP, _LEAST = 4, 6


@dataclass(slots=True)
class Comparison:
    """Everything measured by (side, temperature); a row per prompt, in the same order on every side."""

    #: Tokens per second, as served.
    rates: dict[tuple[str, float], list[float]] = field(default_factory=dict)
    #: (committed tokens, verify rounds), as served and drafting to the full.
    served: dict[tuple[str, float], list[tuple[int, int]]] = field(default_factory=dict)
    full: dict[tuple[str, float], list[tuple[int, int]]] = field(default_factory=dict)
    checked: int = 0
    mismatches: int = 0

    def accept_length(self, drafter: str, temperature: float) -> float:
        """Over all prompts, drafting to the full; bonus included."""
        return _accept_length(self.full[drafter, temperature])

    def served_accept_length(self, side: str, temperature: float) -> float:
        """Over all prompts, with the depth that the engine chose."""
        return _accept_length(self.served[side, temperature])


def _accept_length(rounds: Sequence[tuple[int, int]]) -> float:
    tokens, count = (sum(column) for column in zip(*rounds, strict=True))
    return tokens / count if count else 1.0


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
    folders = {"day0": day_0, "static": static, "live": live}
    quiet = replace(settings.engine, draft_depth=0)
    eager = replace(settings.engine, adaptive_depth=False)
    chosen = {side: LocalEngine(settings.engine, drafter=folders[side], drafter_version=side) for side in SIDES[1:]}
    sides = {"no_speculation": LocalEngine(quiet)} | chosen
    full = {name: LocalEngine(eager, drafter=folders[name], drafter_version=name) for name in DRAFTERS}
    try:
        started = time.monotonic()
        for share, temperature in zip(_SPEED, TEMPERATURES, strict=True):
            _speed(sides, prompts, temperature, found, started + share * seconds, stop, console)
        _accept(full, prompts, found, started + _ACCEPT * seconds, stop, console)
        _check(sides["no_speculation"], served, found, started + seconds, stop, console)
    finally:
        for engine in [*sides.values(), *full.values()]:
            engine.close()
    return found


def _speed(
    engines: dict[str, LocalEngine],
    prompts: Sequence[str],
    temperature: float,
    found: Comparison,
    until: float,
    stop: threading.Event,
    console: Console,
) -> None:
    for number, text in enumerate(track(prompts, description=f"speed, temperature {temperature:g}", console=console)):
        if number >= _WARM_UP + _LEAST and time.monotonic() > until:
            return
        outputs: dict[str, list[int]] = {}
        # Alternate who goes first: caches and clocks favour the second.
        for side in list(engines) if number % 2 else list(reversed(engines)):
            if stop.is_set():
                return
            started = time.perf_counter()
            tokens, last = _generate(engines[side], [text], temperature, seed=number)[0]
            seconds = time.perf_counter() - started
            outputs[side] = tokens
            if number >= _WARM_UP:
                found.rates.setdefault((side, temperature), []).append(len(tokens) / seconds)
                found.served.setdefault((side, temperature), []).append((last.output_tokens - 1, last.rounds))
        if temperature == 0:
            found.checked += len(outputs) - 1
            found.mismatches += sum(o != outputs["no_speculation"] for o in outputs.values())


def _accept(
    engines: dict[str, LocalEngine],
    prompts: Sequence[str],
    found: Comparison,
    until: float,
    stop: threading.Event,
    console: Console,
) -> None:
    """Eight prompts together, every drafter at both temperatures: accept length does not depend on the batch."""
    for at in track(range(0, len(prompts), 8), description="accept length at full depth", console=console):
        if at and time.monotonic() > until:
            return
        for temperature in TEMPERATURES:
            for name, engine in engines.items():
                if stop.is_set():
                    return
                for _, last in _generate(engine, prompts[at : at + 8], temperature, seed=at):
                    found.full.setdefault((name, temperature), []).append((last.output_tokens - 1, last.rounds))


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
    requests = [
        Generation(
            request_id=str(i),
            prompt=tuple(engine.render([{"role": "user", "content": text}])),
            sampling=Sampling(temperature=temperature, seed=seed),
            max_tokens=TOKENS,
            ignore_eos=True,
        )
        for i, text in enumerate(texts)
    ]
    return list(answers(engine, requests))
