"""The drafter's head under a divergence: chunked against naive, in time and in memory at its peak."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from livedraft.cli.provenance import provenance, write
from livedraft.kernels.buckets import graded_buckets, log_buckets, log_buckets_reference
from livedraft.kernels.divergence import forward_kl
from livedraft.serving.local import place as places
from livedraft.trainer.target import read_target
from rich.console import Console
from rich.progress import track
from torch import Tensor

_console = Console(stderr=True)
_CANDIDATES = 32


class Shape(NamedTuple):
    """Rows of an optimiser step, and a head."""

    tokens: int
    vocab: int
    hidden: int


def kernels(place: Path | None, target: str, threads: int, repeats: int) -> None:
    """See ``livedraft bench kernels --help``."""
    torch.set_num_threads(threads)
    vocab, hidden = read_target(places.find(target)).embedding.shape
    shapes = {
        "one_chain": Shape(64, vocab, hidden),
        "one_level": Shape(1536, vocab, hidden),
        "large": Shape(4096, 32768, 1024),
    }
    write(
        {
            "shapes": {name: _measure(name, shape, repeats) for name, shape in shapes.items()},
            "divergence": "forward_kl",
            "candidates": _CANDIDATES,
            "head": "frozen",
            "threads": threads,
            "repeats": repeats,
            "provenance": provenance(),
        },
        place,
    )


def _measure(name: str, shape: Shape, repeats: int) -> dict[str, Any]:
    """Forward and backward of every side, in turn, after one unmeasured turn."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.hidden, generator=g)
    weight = torch.randn(shape.vocab, shape.hidden, generator=g) * shape.hidden**-0.5
    ids = torch.stack([torch.randperm(shape.vocab, generator=g)[:_CANDIDATES] for _ in range(shape.tokens)])
    p = torch.rand(shape.tokens, _CANDIDATES + 1, generator=g)
    p = p / p.sum(1, keepdim=True)
    inverse, share = torch.ones(shape.tokens), torch.full((shape.tokens,), 1 / shape.tokens)

    def of(buckets: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda h: (share * forward_kl(p, buckets(h, weight, ids, inverse)[0])).sum()

    def graded(h: Tensor) -> Tensor:
        return graded_buckets(h, weight, ids, inverse, share, lambda rows, log_q: forward_kl(p[rows], log_q)).total

    sides = {"naive": of(log_buckets_reference), "chunked_twice": of(log_buckets), "chunked": graded}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[float]] = {side: [] for side in sides}
    gradients: dict[str, Tensor] = {}
    for turn in track(range(repeats + 1), description=f"{name} {tuple(shape)}", console=_console):
        # Alternate who goes first: caches and clocks favour the second.
        for side in list(sides) if turn % 2 else list(reversed(sides)):
            leaf = hidden.clone().requires_grad_()
            before = _restart_peak()
            started = time.perf_counter()
            torch.autograd.backward(sides[side](leaf))
            took = time.perf_counter() - started
            assert leaf.grad is not None
            gradients[side] = leaf.grad
            if turn:
                seconds[side].append(took)
            if before is not None:
                peaks[side].append((_resident("VmHWM") - before) / 1e6)
    for side in sides:  # a side that computes something else is not faster
        torch.testing.assert_close(gradients[side], gradients["naive"], rtol=1e-3, atol=1e-7)
    pairs = {
        side: [a / b for a, b in zip(seconds["naive"], seconds[side], strict=True)] for side in sides if side != "naive"
    }
    return {
        **shape._asdict(),
        "ms": {side: round(statistics.median(s) * 1e3, 2) for side, s in seconds.items()},
        "speedup_over_naive": {side: round(statistics.median(r), 3) for side, r in pairs.items()},
        "spread": {side: [round(min(r), 3), round(max(r), 3)] for side, r in pairs.items()},
        # The most of any turn, the first included; null where the system does not tell.
        "peak_mb": {side: round(max(found), 1) if found else None for side, found in peaks.items()},
        "logits_mb": round(shape.tokens * shape.vocab * 4 / 1e6, 1),
    }


def _restart_peak() -> int | None:
    """Bytes resident now, from which on the peak counts anew; None where the system cannot (Linux can)."""
    try:
        # What the allocator kept of an earlier turn would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024
