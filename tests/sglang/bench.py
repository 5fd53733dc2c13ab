"""What livedraft costs and gives a real SGLang on this CPU, as one JSON file (`make bench-sglang`).

    python -m tests.sglang.bench [--out runs/bench/sglang.json] [--minutes 5] [--swaps 50] [--repeats 20]

Three parts, each on servers of its own: the overhead of capture (see ``overhead``), swaps under load, and the whole
loop over traffic of one domain.  Greedy answers are held against a server that neither speculates nor has the plugin.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import SwapRequest
from rich.console import Console
from rich.progress import track

from tests.traffic import traffic

from . import drafters, overhead
from .loop import Loop, looping
from .plugged import engine
from .server import Server, Speculation, serving

console = Console(stderr=True)

#: Requests kept running while drafters are exchanged, tokens of each, and seconds between two exchanges.
_AT_ONCE, _TOKENS, _PAUSE_S = 8, 64, 0.25


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/sglang.json"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=5.0, help="of traffic for the loop; default: %(default)s")
    parser.add_argument("--swaps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="of the comparison of capture; default: %(default)s")
    asked = parser.parse_args()
    prompts = held_out_prompts()[:_AT_ONCE]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        console.print("training a drafter to have something to exchange")
        drafters.write_fresh(folder / "fresh")
        drafters.write_trained(folder / "trained", folder / "fresh", prompts)
        console.print("asking a server without speculation")
        unseen, seen = held_out_prompts("prose")[:12], held_out_prompts("prose")[12:]
        with serving(folder) as plain:
            expected = _answers(plain, [*prompts, *unseen], _TOKENS)
        report = {
            "capture": overhead.measure(folder / "trained", repeats=asked.repeats, console=console),
            "swap": exchange(folder, [folder / "trained", folder / "fresh"], prompts, expected, asked.swaps),
            "loop": learn(folder, folder / "fresh", unseen, seen, expected, asked.minutes),
        }
    swap, loop = report["swap"], report["loop"]
    checked = [part["identical_outputs"] for part in (swap, loop)]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write(
        {
            "capture_overhead": report["capture"]["overhead_of_capture"]["median"],
            "swap": {name: swap[name] for name in ("applied", "failed_requests", "max_added_delay_ms")},
            "accept_length": loop["accept_length"],
            "identical_outputs": {name: sum(one[name] for one in checked) for name in ("checked", "mismatches")},
            "parts": report,
            "provenance": provenance(),
        },
        asked.out,
    )


def exchange(
    folder: Path, drafters_: Sequence[Path], prompts: Sequence[str], expected: dict[str, list[int]], swaps: int
) -> dict[str, Any]:
    """Exchange drafters while eight requests run; how long tokens waited around an exchange, and otherwise."""
    failures, answers, ended = list[str](), list[tuple[str, list[int], list[float]]](), threading.Event()
    with engine(folder, Speculation(drafters_[-1])) as one:
        one.started()

        def ask(offset: int) -> None:
            for prompt in itertools.islice(itertools.cycle(prompts), offset, None):
                if ended.is_set():
                    return
                try:
                    answers.append((prompt, *one.server.stream(prompt, max_new_tokens=_TOKENS)))
                except Exception as error:
                    failures.append(repr(error))

        askers = [threading.Thread(target=ask, args=(offset,)) for offset in range(_AT_ONCE)]
        for asker in askers:
            asker.start()
        moments, stalls = list[tuple[float, float]](), list[float]()
        time.sleep(5)
        for number in track(range(swaps), description="swapping", console=console):
            since = time.perf_counter()
            receipt = one.admin.swap(_request(drafters_[number % 2], f"{number}"))
            moments.append((since, time.perf_counter()))
            stalls.append(receipt.stall_s)
            time.sleep(_PAUSE_S)
        ended.set()
        for asker in askers:
            asker.join()
    gaps = [pair for _, _, times in answers for pair in itertools.pairwise(times)]
    around = [b - a for a, b in gaps if any(a <= end and since <= b for since, end in moments)]
    others = [b - a for a, b in gaps if not any(a <= end and since <= b for since, end in moments)]
    normal = statistics.median(others)

    def added(waits: Sequence[float]) -> float:
        return round((max(waits) - normal) * 1e3, 2)

    return {
        "applied": len(moments),
        "failed_requests": len(failures),
        "requests": len(answers) + len(failures),
        # From asking for the exchange, staging included, to its receipt.
        "max_added_delay_ms": added(around),
        "median_step_ms": round(normal * 1e3, 2),
        "p99_added_delay_ms": round((statistics.quantiles(around, n=100)[98] - normal) * 1e3, 2),
        # The yardstick: how long tokens wait on this machine while nothing is exchanged.
        "max_added_delay_without_swap_ms": added(others),
        "p99_added_delay_without_swap_ms": round((statistics.quantiles(others, n=100)[98] - normal) * 1e3, 2),
        "stall_ms": {"median": round(statistics.median(stalls) * 1e3, 3), "max": round(max(stalls) * 1e3, 3)},
        "identical_outputs": _identical([(prompt, ids) for prompt, ids, _ in answers], expected),
    }


def learn(
    folder: Path,
    first: Path,
    unseen: Sequence[str],
    seen: Sequence[str],
    expected: dict[str, list[int]],
    minutes: float,
) -> dict[str, Any]:
    """Close the loop; the accept length on prompts that are not in its traffic, before and after."""
    with looping(folder, first) as loop:
        answers, day0 = _probe(loop, unseen)
        served = list[object]()
        with traffic(lambda prompt, _: served.append(loop.ask(prompt)), clients=4, prompts=seen):
            for _ in track(range(max(1, round(minutes * 60))), description="serving and learning", console=console):
                time.sleep(1)
        after, final = _probe(loop, unseen)
        decisions = [decision["action"] for decision in loop.decisions()]
        status = loop.engine.admin.status()
    return {
        "accept_length": {"day0": round(day0, 3), "final": round(final, 3), "ratio": round(final / day0, 3)},
        "requests": len(served),
        "decisions": {action: decisions.count(action) for action in sorted(set(decisions))},
        "traces": {"offered": status.traces_offered, "dropped": status.traces_dropped},
        "identical_outputs": _identical([*answers, *after], expected),
    }


def _probe(loop: Loop, prompts: Sequence[str]) -> tuple[list[tuple[str, list[int]]], float]:
    """Greedy answers of the first server, and the accept length over all of them."""
    answers = [(p, loop.engine.server.generate(p, max_new_tokens=_TOKENS)) for p in prompts]
    tokens = sum(len(answer["output_ids"]) - 1 for _, answer in answers)
    rounds = sum(answer["meta_info"]["spec_verify_ct"] for _, answer in answers)
    return [(prompt, answer["output_ids"]) for prompt, answer in answers], tokens / rounds


def _answers(server: Server, prompts: Sequence[str], tokens: int) -> dict[str, list[int]]:
    return {prompt: server.generate(prompt, max_new_tokens=tokens)["output_ids"] for prompt in prompts}


def _identical(answers: Sequence[tuple[str, list[int]]], expected: dict[str, list[int]]) -> dict[str, int]:
    return {"checked": len(answers), "mismatches": sum(ids != expected[prompt] for prompt, ids in answers)}


def _request(folder: Path, version: str) -> SwapRequest:
    tensors = checkpoint.verify(folder)[1].tensors
    return SwapRequest(path=str(folder), version=version, checksum=checkpoint.checksum(tensors))


if __name__ == "__main__":
    main()
