"""What a peer's learner writes down after each window: the lines that ``benchmarks/learn_run.py`` calls ``Mark``.

Standard library alone: it runs in the peers' environments, which do not have ours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path


def write_mark(out: Path, *, requests: int, tokens: int, steps: int, trained: int, cpu_s: float, wall_s: float) -> None:
    """Append a line to ``marks.jsonl`` in ``out``."""
    mark = {
        "requests": requests,
        "tokens": tokens,
        "steps": steps,
        "trained": trained,
        "cpu_s": round(cpu_s, 3),
        "wall_s": round(wall_s, 3),
        "peak_rss_mb": _peak_rss_mb(),
    }
    with (out / "marks.jsonl").open("a") as file:
        file.write(json.dumps(mark) + "\n")


def _peak_rss_mb() -> float:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
