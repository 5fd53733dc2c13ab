"""What livedraft costs and gives a real SGLang, as one JSON file (`make bench-sglang`, on this CPU).

    python -m tests.sglang.bench [--out runs/bench/sglang.json] [--minutes 5] [--swaps 50] [--repeats 60]
    python -m tests.sglang.bench --device cuda [--target Qwen/Qwen3-8B --drafter FOLDER]

Three parts, each on servers of its own: the overhead of capture (see ``overhead``), swaps under load (see
``exchange``), and the whole loop over traffic of one domain.  Greedy answers are held against a server that neither
speculates nor has the plugin.

On a GPU (`make bench-sglang-gpu`) it runs in an environment that has SGLang, its kernels and the plugin, and takes
SGLang as it comes, with captured graphs; the loop is left out.  **That has not been run yet**: it was written where
there is no GPU.  Two servers share the GPU's memory, and the tokens for their caches are few.  Answers there are those
of bfloat16, which depends on what else is in a batch: a mismatch need not be a fault.
"""

from __future__ import annotations

import argparse
import itertools
import os
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

from . import overhead, pace, pairs
from .plugged import engine
from .server import SHIM, START_S, TARGET, Device, Server, Speculation, serving

if TYPE_CHECKING:
    from .loop import Loop

console = Console(stderr=True)

PARTS = ("capture", "swap", "loop")
#: Requests kept running while drafters are exchanged, tokens of each there, and of answers elsewhere.
_AT_ONCE, _LONG, _TOKENS = 8, 128, 64
#: Seconds between two exchanges, at least, and what of them is left to the one before to die away.
_PAUSE_S, _AFTER_S = 0.5, 0.1


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
            expected = _answers(plain, unseen, _TOKENS)
            long = _answers(plain, prompts, _LONG)
        on: dict[str, Any] = {"target": target, "device": asked.device}
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "capture": lambda: overhead.measure(other, repeats=asked.repeats, console=console, **on),
            "swap": lambda: exchange(folder, [other, first], long, asked.swaps, **on),
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
    parser.add_argument("--repeats", type=int, default=60, help="of the comparison of capture; default: %(default)s")
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
    expected: dict[str, list[int]],
    swaps: int,
    *,
    target: Path = TARGET,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Exchange drafters while eight requests run.

    What is added to a step of the scheduler (see ``pace``) is counted from asking for an exchange, staging included,
    to its receipt, and as a yardstick over as many steps just before, when nothing is exchanged.
    """
    failures, answers, ended = list[str](), list[tuple[str, list[int], list[float]]](), threading.Event()
    paths = [*([str(SHIM)] if device == "cpu" else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    pacing = pace.installed(folder / "pace", paths)
    with engine(folder, Speculation(drafters[-1]), target=target, device=device, **pacing) as one:
        one.started(START_S[device])

        def ask(offset: int) -> None:
            for prompt in itertools.islice(itertools.cycle(expected), offset, None):
                if ended.is_set():
                    return
                try:
                    answers.append((prompt, *one.server.stream(prompt, max_new_tokens=_LONG)))
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
            time.sleep(max(_PAUSE_S, 2 * (moments[-1][1] - since)))
        ended.set()
        for asker in askers:
            asker.join()
    steps = pace.steps(folder / "pace")
    return {
        "applied": len(moments),
        "failed_requests": len(failures),
        "requests": len(answers) + len(failures),
        **delays(steps, moments),
        # On the scheduler's thread: copying the weights in, which the next batch waits for.
        "stall_ms": {"median": _ms(statistics.median(stalls), 3), "max": _ms(max(stalls), 3)},
        "waits_at_clients_ms": _waits([times for *_, times in answers], moments),
        "identical_outputs": _identical([(prompt, ids) for prompt, ids, _ in answers], expected),
    }


def delays(steps: Sequence[pace.Step], moments: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What was added to the worst step of each exchange; ``moments`` are their beginnings and ends."""
    added = pace.added(steps)
    swapping, calm = list[float](), list[float]()
    over = 0.0
    for since, until in moments:
        touched = [n for n, (step, _) in enumerate(added) if step.start <= until and since <= step.end]
        before = added[max(0, touched[0] - len(touched)) : touched[0]] if touched else []
        if before and len(before) == len(touched) and before[0][0].start >= over:
            swapping.append(max(added[n][1] for n in touched))
            calm.append(max(more for _, more in before))
        over = until + _AFTER_S
    return {
        "max_added_delay_ms": _ms(max(swapping)),
        "max_added_delay_without_swap_ms": _ms(max(calm)),
        # Of the worst step of an exchange over the worst of as many before it.
        "added_by_swap_ms": pairs.told([1e3 * (a - b) for a, b in zip(swapping, calm, strict=True)], 2),
        "step_ms": _ms(statistics.median(step.took for step, _ in added)),
        "step_on_the_clock_ms": _ms(statistics.median(step.end - step.start for step, _ in added)),
        "swap_ms": _ms(statistics.median(until - since for since, until in moments)),
    }


def _waits(arrivals: Sequence[Sequence[float]], moments: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How long clients waited for tokens, prefills of others and the way to the client included."""
    gaps = [pair for times in arrivals for pair in itertools.pairwise(times)]
    touched = [any(a <= end and since <= b for since, end in moments) for a, b in gaps]
    kinds = {"swapping": True, "otherwise": False}
    waits = {kind: [b - a for (a, b), t in zip(gaps, touched, strict=True) if t is of] for kind, of in kinds.items()}
    return {
        kind: {"median": _ms(statistics.median(w)), "p99": _ms(statistics.quantiles(w, n=100)[98]), "max": _ms(max(w))}
        for kind, w in waits.items()
    }


def _ms(seconds: float, digits: int = 2) -> float:
    return round(seconds * 1e3, digits)


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
