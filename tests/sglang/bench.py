"""What livedraft costs and gives a real SGLang, as one JSON file (`make bench-sglang`, on this CPU).

    python -m tests.sglang.bench [--out runs/bench/sglang.json] [--minutes 5] [--swaps 50] [--repeats 20]
    python -m tests.sglang.bench --device cuda [--target Qwen/Qwen3-8B --drafter FOLDER]

Three parts, each on servers of its own: the overhead of capture (see ``overhead``), swaps under load, and the whole
loop over traffic of one domain.  Greedy answers are held against a server that neither speculates nor has the plugin.

On a GPU (`make bench-sglang-gpu`) it runs in an environment that has SGLang, its kernels and the plugin, and takes
SGLang as it comes, with captured graphs; the loop is left out.  **That has not been run yet**: it was written where
there is no GPU.  Two servers share the GPU's memory, and the tokens for their caches are few.  Answers there are those
of bfloat16, which depends on what else is in a batch: a mismatch need not be a fault.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance, write
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected
from livedraft.contracts.messages import SwapRequest
from livedraft.serving.local import place
from rich.console import Console
from rich.progress import track

from tests.traffic import traffic

from . import overhead
from .plugged import engine
from .server import START_S, TARGET, Device, Server, Speculation, serving

if TYPE_CHECKING:
    from .loop import Loop

console = Console(stderr=True)

PARTS = ("capture", "swap", "loop")
#: Requests kept running while drafters are exchanged, tokens of each, and seconds between two exchanges.
_AT_ONCE, _TOKENS, _PAUSE_S = 8, 64, 0.25


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for."""
    asked = arguments(words)
    target = place.find(asked.target)
    prompts, prose = held_out_prompts()[:_AT_ONCE], held_out_prompts("prose")
    unseen, seen = prose[:12], prose[12:]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first, other = drafters_in(folder, asked.drafter, prompts)
        console.print("asking a server without speculation")
        with serving(folder, target=target, device=asked.device) as plain:
            expected = _answers(plain, [*prompts, *unseen], _TOKENS)
        on: dict[str, Any] = {"target": target, "device": asked.device}
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "capture": lambda: overhead.measure(other, repeats=asked.repeats, console=console, **on),
            "swap": lambda: exchange(folder, [other, first], prompts, expected, asked.swaps, **on),
            "loop": lambda: learn(folder, first, unseen, seen, expected, asked.minutes),
        }
        report = {name: parts[name]() for name in asked.parts}
    swap, loop = report.get("swap"), report.get("loop")
    checked = [part["identical_outputs"] for part in (swap, loop) if part]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write(
        {
            "capture_overhead": report["capture"]["overhead_of_capture"]["median"] if "capture" in report else None,
            "swap": swap and {name: swap[name] for name in ("applied", "failed_requests", "max_added_delay_ms")},
            "accept_length": loop and loop["accept_length"],
            "identical_outputs": {name: sum(one[name] for one in checked) for name in ("checked", "mismatches")},
            "parts": report,
            "target": asked.target,
            "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
            "provenance": provenance(),
        },
        asked.out,
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for; ends the process with a reason where that cannot be had."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sglang.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/sglang.json"), help="default: %(default)s")
    parser.add_argument("--parts", type=_parts, help="by commas; default: capture,swap,loop, without loop on a GPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="of traffic for the loop; default: %(default)s")
    parser.add_argument("--swaps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="of the comparison of capture; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--target", default="bundled", help="folder or Hugging Face id; default: %(default)s")
    parser.add_argument("--drafter", type=Path, help="its EAGLE-3 drafter; default: one is trained, for bundled alone")
    asked = parser.parse_args(words)
    asked.parts = asked.parts or PARTS[: 2 if asked.device == "cuda" else 3]
    if (asked.target == "bundled") != (asked.drafter is None):
        parser.error("--target and --drafter go together: see `livedraft drafts init` and `livedraft drafts import`")
    if "loop" in asked.parts and (asked.device != "cpu" or asked.target != "bundled"):
        parser.error("--parts loop: runs with --device cpu and the bundled target only")
    if asked.swaps < 2 or asked.repeats < 2:
        parser.error("--swaps and --repeats: expected 2 or more")
    if asked.device == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"--device cuda: no CUDA device is there for torch {torch.__version__}")
        if "livedraft" not in entry_points(group="sglang.srt.plugins").names:
            parser.error('--device cuda: SGLang would not find the plugin; pip install --editable ".[sglang]"')
    if asked.drafter is not None:
        try:
            checkpoint.verify(asked.drafter)
        except DrafterRejected as error:
            parser.error(f"--drafter {asked.drafter}: {error}; `livedraft drafts import` makes one of a published one")
    return asked


def _parts(value: str) -> tuple[str, ...]:
    if unknown := [name for name in value.split(",") if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, unknown))}, expected {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in value.split(","))


def drafters_in(folder: Path, given: Path | None, prompts: Sequence[str]) -> tuple[Path, Path]:
    """Two of the same shapes: a fresh and a trained one, or the one that was given and the same with another gain."""
    if given is None:
        from . import drafters

        console.print("training a drafter to have something to exchange")
        drafters.write_fresh(folder / "fresh")
        drafters.write_trained(folder / "trained", folder / "fresh", prompts)
        return folder / "fresh", folder / "trained"
    config, manifest = checkpoint.verify(given)
    arrays = {name: np.array(array) for name, array in checkpoint.load(given).items()}
    arrays["norm.weight"] *= np.float32(0.99)
    checkpoint.write(folder / "other", config, arrays, manifest)
    return folder / "other", given


def exchange(
    folder: Path,
    drafters: Sequence[Path],
    prompts: Sequence[str],
    expected: dict[str, list[int]],
    swaps: int,
    *,
    target: Path = TARGET,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Exchange drafters while eight requests run; how long tokens waited around an exchange, and otherwise."""
    failures, answers, ended = list[str](), list[tuple[str, list[int], list[float]]](), threading.Event()
    with engine(folder, Speculation(drafters[-1]), target=target, device=device) as one:
        one.started(START_S[device])

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
            receipt = one.admin.swap(_request(drafters[number % 2], f"{number}"))
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
    from .loop import looping

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
