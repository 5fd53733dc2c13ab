"""What capture costs a real SGLang: the same eight requests, plain, untraced and traced, in turn.

    python -m tests.sglang.overhead DRAFTER [--repeats 10] [--topk 1]

Plain is a second server without the plugin, idle while the other one is asked.  On a CPU capture's share of a round
is computed on the scheduler's core; on a GPU it is queued behind the forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance
from rich.console import Console
from rich.progress import track

from .plugged import engine
from .relay import Relay
from .server import START_S, TARGET, Device, Server, Speculation, serving

_TOKENS = 48


def main() -> None:
    """Print what ``measure`` finds, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--topk", type=int, default=1)
    asked = parser.parse_args()
    report = measure(asked.drafter, repeats=asked.repeats, topk=asked.topk)
    json.dump(report | {"provenance": provenance()}, sys.stdout, indent=2)


def measure(
    drafter: Path,
    *,
    repeats: int,
    topk: int = 1,
    target: Path = TARGET,
    device: Device = "cpu",
    console: Console | None = None,
) -> dict[str, Any]:
    """Medians, and overheads as medians of the pairs with their quartiles."""
    speculation = Speculation(drafter, topk=topk)
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        relay = held.enter_context(contextlib.closing(Relay()))
        on: dict[str, Any] = {"target": target, "device": device}
        captured = held.enter_context(engine(folder, speculation, LIVEDRAFT_TRACES__URL=relay.url, **on))
        captured.started(START_S[device])  # only then it begins to record
        ours = captured.server
        plain = held.enter_context(serving(folder, speculation, **on))
        kinds = {"plain": (plain, {}), "untraced": (ours, {"traced": False}), "traced": (ours, {})}
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        turns = range(-1, repeats)  # the first is for warmth
        for repeat in track(turns, description="capturing", console=console or Console(stderr=True)):
            for kind in [*kinds][:: 1 if repeat % 2 else -1]:
                rate = _rate(*kinds[kind])
                if repeat >= 0:
                    rates[kind].append(rate)
        status = captured.started()
    return {
        "tokens_per_second": {kind: round(statistics.median(r), 1) for kind, r in rates.items()},
        "overhead_of_capture": _overhead(rates["untraced"], rates["traced"]),
        "overhead_in_all": _overhead(rates["plain"], rates["traced"]),
        "traces": {"offered": status.traces_offered, "dropped": status.traces_dropped},
        "repeats": repeats,
        "topk": topk,
    }


def _rate(server: Server, told: dict[str, Any]) -> float:
    """Tokens per second of eight requests at once."""
    params = {"temperature": 0.0, "max_new_tokens": _TOKENS, "ignore_eos": True, "custom_params": {"livedraft": told}}
    prompts = held_out_prompts()[:8]
    started = time.perf_counter()
    answer = server.post("/generate", {"text": prompts, "sampling_params": [params] * len(prompts)})
    return sum(len(one["output_ids"]) for one in answer) / (time.perf_counter() - started)


def _overhead(without: list[float], with_: list[float]) -> dict[str, Any]:
    pairs = [1 - b / a for a, b in zip(without, with_, strict=True)]
    quartiles = statistics.quantiles(pairs, n=4)
    return {"median": round(statistics.median(pairs), 4), "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)]}


if __name__ == "__main__":
    main()
