"""One learner in a process of its own: a trace set in, checkpoints out.

    python -m livedraft.benchmarks.learn_run JOB

Traffic comes in windows of requests.  After each, the learner may compute for as long as the traffic's tokens allow
(``seconds_per_ktoken``, processor time of this process; what a window leaves over is lost, as time is), or until it
has used its traces as often as its settings let it.  Then what it would publish is written down.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from livedraft.benchmarks.learn_files import learner_of, read, write_candidate
from livedraft.cli.wiring import leave_with_parent
from livedraft.contracts.messages import Delivery, Record
from livedraft.contracts.settings import Trainer as TrainerSettings


class Job(Record, frozen=True, kw_only=True, omit_defaults=False):
    """What a learner's process is told, defaults included: a peer's does not know them."""

    target: str
    #: File of the trace set, as ``learn_traces`` and as ``learn_peers`` write it.
    traces: str
    converted: str = ""
    #: Checkpoint to begin with.
    start: str
    #: Over the trainer's defaults; the recipe's own names for a peer.
    settings: dict[str, Any] = {}
    #: Requests of a window.
    window: int
    seconds_per_ktoken: float
    #: Stop after so many windows; 0 is all of them.
    windows: int = 0
    seed: int
    threads: int
    out: str


class Mark(Record, frozen=True, kw_only=True):
    """After a window: a line of ``marks.jsonl``, beside the checkpoint of the same number."""

    requests: int
    #: Output tokens of the traffic so far.
    tokens: int
    steps: int
    #: Supervised positions so far, each pass over a token counted.
    trained: int
    #: Of learning alone: reading traces and writing checkpoints left out.
    cpu_s: float
    wall_s: float
    #: The process's high-water mark.
    peak_rss_mb: float


def main() -> None:
    """Learn, as the job in the file named on the command line says."""
    leave_with_parent()
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    traces = read(Path(job.traces))
    settings = msgspec.convert({"threads": job.threads, "seed": job.seed} | job.settings, TrainerSettings)
    learner = learner_of(Path(job.start), traces[0], settings, job.target)
    out = Path(job.out)
    marks = Marks(out)
    write_candidate(learner, out / "0")
    marks.add(requests=0, tokens=0, steps=0, trained=0)
    tokens, ahead = 0, 0.0
    starts = range(0, len(traces), job.window)
    for number, start in enumerate(starts[: job.windows or None], 1):
        window = traces[start : start + job.window]
        new = sum(trace.output.shape[0] for trace in window)
        tokens += new
        # A step that ran over the end of its window is paid for in the next.
        allowance = job.seconds_per_ktoken * new / 1000 + min(ahead, 0.0)
        with marks.learning:
            for offset, trace in enumerate(window, start):
                learner.admit(Delivery(partition="0", offset=offset, item=trace))
            began = time.process_time()
            while learner.can_learn and time.process_time() - began < allowance:
                learner.step()
            ahead = allowance - (time.process_time() - began)
        write_candidate(learner, out / str(number))
        marks.add(requests=start + len(window), tokens=tokens, steps=learner.steps, trained=learner.tokens)


class Stopwatch:
    """Processor and wall time spent inside ``with``."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.process_time() - self._cpu
        self.wall_s += time.perf_counter() - self._wall


class Marks:
    """Writes ``marks.jsonl``, a line at a time, for the parent to count."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.learning = Stopwatch()
        self._path = out / "marks.jsonl"

    def add(self, *, requests: int, tokens: int, steps: int, trained: int) -> None:
        """Write one down."""
        mark = Mark(
            requests=requests,
            tokens=tokens,
            steps=steps,
            trained=trained,
            cpu_s=round(self.learning.cpu_s, 3),
            wall_s=round(self.learning.wall_s, 3),
            peak_rss_mb=_peak_rss_mb(),
        )
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(mark) + b"\n")


def _peak_rss_mb() -> float:
    # Not getrusage: its high-water mark begins with that of the process that started this one.  Linux alone tells.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return round(int(found[1]) / 1024, 1) if found else 0.0


if __name__ == "__main__":
    main()
