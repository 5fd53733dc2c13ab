"""What the plugin does in which process, with stand-ins for SGLang's objects."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from livedraft.contracts.errors import Overloaded
from livedraft.contracts.settings import Settings
from livedraft.serving.sglang.plugin import Plugin, unsupported


class EAGLEWorkerV2:
    pass


class MultiLayerEagleWorkerV2:
    pass


def scheduler(worker: object, *, eagle3: bool = True) -> Any:
    return SimpleNamespace(draft_worker=worker, spec_algorithm=SimpleNamespace(is_eagle3=lambda: eagle3))


def arguments(**sizes: int) -> Any:
    return SimpleNamespace(**{"dp_size": 1, "pp_size": 1} | sizes)


@pytest.mark.parametrize(
    ("running", "args", "reason"),
    [
        (scheduler(EAGLEWorkerV2()), arguments(), None),
        (scheduler(EAGLEWorkerV2()), arguments(dp_size=2), "--dp-size is 2"),
        (scheduler(EAGLEWorkerV2()), arguments(pp_size=4), "--pp-size is 4"),
        (scheduler(None, eagle3=False), arguments(), "not started with --speculative-algorithm EAGLE3"),
        (scheduler(MultiLayerEagleWorkerV2()), arguments(), "drafts with MultiLayerEagleWorkerV2"),
    ],
)
def test_what_is_supported(running: Any, args: Any, reason: str | None) -> None:
    found = unsupported(running, args)
    assert found is None if reason is None else reason in (found or "")


def test_other_processes_of_sglang_pay_nothing() -> None:
    code = """
import sys, types
sys.modules["sglang.srt.managers.scheduler"] = types.ModuleType("scheduler")  # imported, but this is no child
from livedraft.serving.sglang.plugin import register
register()
assert not {"torch", "sglang", "zmq", "zstandard", "fastapi"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_part_of_an_sglang_that_is_not_there_is_off_and_nothing_is_set() -> None:
    plugin, registered = Plugin(Settings()), list[str]()
    plugin.install(lambda target, around: registered.append(target))
    assert registered == []
    with pytest.raises(Overloaded, match="off in this engine: SGLang unknown: "):
        plugin.status()
