"""What capture costs a real SGLang: the same requests, eight at a time, plain, untraced and traced, in turn.

    python -m tests.sglang.overhead DRAFTER [--repeats 60] [--topk 1]

Untraced and traced are the same server, asked one right after the other and in the other order the next time, so
that what drifts falls on both; overheads are medians over such pairs, each with the interval that holds the true one
at 95 %.  Plain is a second server without the plugin, idle while the other one is asked, and asked less often.

Time on the clock holds all that two cores do besides.  So the same is told without what the scheduler's main thread,
which every batch waits for, waited for a processor; its waits for the interpreter stay in.  And the processor time of
that thread, and of all threads of the scheduler, with the one that makes traces.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zmq
from livedraft.cli.prompts import held_out_prompts
from livedraft.cli.provenance import provenance
from rich.console import Console
from rich.progress import track

from . import pairs
from .plugged import engine
from .server import START_S, TARGET, Device, Server, Speculation, serving

#: Requests of one measurement, of which SGLang runs eight at a time: traces of the first are made beside the last.
_REQUESTS, _TOKENS = 24, 48
#: Pairs to one measurement of plain.
_PLAIN = 4
_ARRIVE_S = 60.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds per token."""

    clock: float
    #: On the clock, without the main thread's waits for a processor.
    unimpeded: float
    #: Processor time of the scheduler's main thread, and of all its threads.
    thread: float
    process: float


class Drain:
    """The other end of the line, elsewhere: takes what comes and counts it."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self.url = f"relay+tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.taken = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Be gone."""
        self._closing.set()
        self._thread.join()
        self._socket.close()
        self._context.term()

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._socket.poll(100):
                self._socket.recv(copy=False)
                self.taken += 1


def main() -> None:
    """Print what ``measure`` finds, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--repeats", type=int, default=60)
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
    """Tokens per second, and overheads as shares of what is lost or spent more."""
    speculation = Speculation(drafter, topk=topk)
    costs: dict[str, dict[int, Cost]] = {"plain": {}, "untraced": {}, "traced": {}}
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        drain = held.enter_context(contextlib.closing(Drain()))
        on: dict[str, Any] = {"target": target, "device": device}
        captured = held.enter_context(engine(folder, speculation, LIVEDRAFT_TRACES__URL=drain.url, **on))
        captured.started(START_S[device])  # only then it begins to record
        ours = captured.server
        plain = held.enter_context(serving(folder, speculation, **on))
        for repeat in track(range(-1, repeats), description="capturing", console=console or Console(stderr=True)):
            turn = ["untraced", "traced"][:: 1 if repeat % 2 else -1]
            for kind in [*turn, "plain"] if repeat % _PLAIN == 0 else turn:
                cost = _cost(plain if kind == "plain" else ours, drain, traced=kind == "traced")
                if repeat >= 0:  # the first is for warmth
                    costs[kind][repeat] = cost
        status = captured.started()
    untraced, traced = costs["untraced"], costs["traced"]
    return {
        "tokens_per_second": {
            kind: round(1 / statistics.median(cost.clock for cost in told.values()), 1) for kind, told in costs.items()
        },
        "overhead_of_capture": overhead(untraced, traced, "clock", lost=True),
        "overhead_unimpeded": overhead(untraced, traced, "unimpeded", lost=True),
        "overhead_in_all": overhead(costs["plain"], traced, "clock", lost=True),
        "processor_time_of_capture": {
            "main_thread": overhead(untraced, traced, "thread"),
            "all_threads": overhead(untraced, traced, "process"),
        },
        "traces": {"offered": status.traces_offered, "dropped": status.traces_dropped},
        "repeats": repeats,
        "topk": topk,
    }


def overhead(
    without: Mapping[int, Cost],
    with_: Mapping[int, Cost],
    of: Literal["clock", "unimpeded", "thread", "process"],
    *,
    lost: bool = False,
) -> dict[str, Any]:
    """How much more is spent on a token, by the repeats of both; ``lost``: how many fewer tokens that makes."""
    ratios = [getattr(with_[n], of) / getattr(cost, of) for n, cost in without.items()]
    return pairs.told([1 - 1 / ratio if lost else ratio - 1 for ratio in ratios])


def _cost(server: Server, drain: Drain, *, traced: bool) -> Cost:
    told = {"livedraft": {"traced": traced}}
    params = {"temperature": 0.0, "max_new_tokens": _TOKENS, "ignore_eos": True, "custom_params": told}
    prompts = held_out_prompts()[:8] * (_REQUESTS // 8)
    scheduler, taken = _scheduler(server), drain.taken
    main, others, waited = _spent(scheduler)
    started = time.perf_counter()
    answer = server.post("/generate", {"text": prompts, "sampling_params": [params] * len(prompts)})
    took = time.perf_counter() - started
    spent = _spent(scheduler)
    main, waited = spent[0] - main, spent[2] - waited
    deadline = time.monotonic() + _ARRIVE_S
    while traced and drain.taken < taken + len(prompts):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{drain.taken - taken} of {len(prompts)} traces arrived within {_ARRIVE_S:.0f} s")
        time.sleep(0.01)
    others = _spent(scheduler)[1] - others
    tokens = sum(len(one["output_ids"]) for one in answer)
    return Cost(took / tokens, (took - waited) / tokens, main / tokens, (main + others) / tokens)


def _scheduler(server: Server) -> int:
    """Process id of the first."""
    tasks = Path(f"/proc/{server.process.pid}/task")
    children = [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    named = {child: Path(f"/proc/{child}/comm").read_text() for child in sorted(children)}
    return next(child for child, name in named.items() if name.startswith("sglang::sched"))


def _spent(process: int) -> tuple[float, float, float]:
    """Seconds on a processor of the main thread, of the others that are there, and the first's waits for one."""
    tasks = Path(f"/proc/{process}/task")
    told = {
        int(task.name): [int(t) / 1e9 for t in (task / "schedstat").read_text().split()] for task in tasks.iterdir()
    }
    on, waited, _ = told.pop(process)
    return on, sum(other[0] for other in told.values()), waited


if __name__ == "__main__":
    main()
