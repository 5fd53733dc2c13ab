"""A swap controller of its own, on a real registry and an engine over HTTP: python controller_process.py JSON."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from livedraft.contracts import settings
from livedraft.swap.controller import Controller
from livedraft.swap.engine_admin import HttpEngineAdmin
from livedraft.swap.evidence import Evidence
from livedraft.swap.gate import GateRules
from livedraft.swap.mlflow_registry import MlflowRegistry
from livedraft.swap.swapper import Swapper
from livedraft.traces.memory import MemoryStream

from tests.swap.fakes import FakeReplay, trace


def main() -> None:
    given = json.loads(sys.argv[1])
    stream = MemoryStream()
    for n in range(8):
        stream.offer(trace(n, finished_at=time.time()))
    swapper = Swapper(
        MlflowRegistry(given["registry"], given["model"]), HttpEngineAdmin(given["engine"]), Path(given["folder"])
    )
    controller = Controller(
        swapper,
        Evidence(stream.source("gate"), lambda _: True, 8),
        FakeReplay(given["accept_length"]),
        settings.Swap(
            poll_s=0.05, gate_traces=8, gate_min_traces=4, gate_max_error=1.0, watch_rounds=100, watch_longer=1.0
        ),
        GateRules(min_traces=4, bootstrap=20),
    )
    controller.run(threading.Event())


if __name__ == "__main__":
    main()
