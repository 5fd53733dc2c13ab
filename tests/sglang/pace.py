"""How long each batch of a real SGLang took, from inside its scheduler: a plugin that the benchmark adds.

What a client waits for a token holds HTTP, the detokenizer and the client's own threads, and now and then the prefill
of another request: on two cores tens of milliseconds, with or without a swap.  The scheduler's own steps hold none
of these; what a swap does to a running request, it does there.  Nor is counted how long the scheduler, ready to go
on, waited for a processor (Linux tells): that is the machine's other work.  A wait for the interpreter that a thread
of ours has is counted.
"""

from __future__ import annotations

import itertools
import os
import statistics
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = "PACE_FILE"
_RESULT = "sglang.srt.managers.scheduler.Scheduler.process_batch_result"
#: When its results were out (``time.perf_counter_ns``, one clock for all processes), nanoseconds waited for a processor
#: until then, its requests, 1 where it decoded.
_LINE = struct.Struct("<4q")
#: Steps of a shape below which nobody knows what is normal for it.
_ENOUGH = 20


@dataclass(frozen=True, slots=True)
class Step:
    """From one batch's results to the next one's: what every running request waits for its next tokens."""

    start: float
    end: float
    requests: int
    decodes: bool
    #: Seconds of it without a processor.
    waited: float = 0.0

    @property
    def took(self) -> float:
        """Seconds, less those."""
        return self.end - self.start - self.waited


def register() -> None:
    """What SGLang calls in each of its processes; only a scheduler ever comes to the hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if _FILE not in os.environ:
        return
    # Unbuffered: the server ends by SIGKILL.
    file = open(os.environ[_FILE], "ab", buffering=0)  # noqa: SIM115
    # Of this thread, which will be the scheduler's: seconds on a processor, seconds waited for one.
    schedule = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def around(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        requests, decodes = len(batch.reqs), batch.forward_mode.is_decode()
        returned = original(scheduler, batch, *args, **kwargs)
        waited = int(os.pread(schedule, 100, 0).split()[1])
        file.write(_LINE.pack(time.perf_counter_ns(), waited, requests, decodes))
        return returned

    HookRegistry.register(_RESULT, around, HookType.AROUND)


def installed(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """The environment of a server with this plugin beside ours, as ``plugged.engine`` takes it."""
    about = folder / "pace-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pace\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\npace = {__name__}:register\n")
    return {
        "plugins": "pace,livedraft",
        "PYTHONPATH": os.pathsep.join([str(folder), *paths]),
        _FILE: str(folder / "pace"),
    }


def steps(folder: Path) -> list[Step]:
    """All since the server's start, in order."""
    lines = [*_LINE.iter_unpack((folder / "pace").read_bytes())]
    return [
        Step(before[0] / 1e9, at / 1e9, requests, bool(decodes), (waited - before[1]) / 1e9)
        for before, (at, waited, requests, decodes) in itertools.pairwise(lines)
    ]


def added(steps: Sequence[Step]) -> list[tuple[Step, float]]:
    """Decoding steps with the seconds that each took beyond the median of those with as many requests."""
    shapes = defaultdict[int, list[float]](list)
    for step in steps:
        if step.decodes:
            shapes[step.requests].append(step.took)
    normal = {requests: statistics.median(took) for requests, took in shapes.items() if len(took) >= _ENOUGH}
    return [(s, s.took - normal[s.requests]) for s in steps if s.decodes and s.requests in normal]
