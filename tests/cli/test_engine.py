"""The engine's process starts with what it can get, and remembers what it served with."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from livedraft.cli.engine import LastKnown
from livedraft.cli.ports import free_port
from livedraft.cli.settings_file import write_settings
from livedraft.cli.wiring import write_fresh_drafter
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import DrafterRejected, SwapFailed
from livedraft.contracts.messages import SwapRequest
from livedraft.contracts.settings import Engine, Gateway, Registry, Settings, Traces
from livedraft.swap.engine_admin import HttpEngineAdmin


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two fresh ones."""
    folder = tmp_path_factory.mktemp("drafters")
    for seed in range(2):
        write_fresh_drafter(Engine(draft_intermediate=64), folder / str(seed), seed)
    return [folder / "0", folder / "1"]


def checksum(folder: Path) -> str:
    return checkpoint.checksum(checkpoint.verify(folder)[1].tensors)


def test_the_last_drafter_is_kept_and_the_one_before_is_not(tmp_path: Path, drafters: list[Path]) -> None:
    known = LastKnown(tmp_path)
    assert known.recall() is None
    for version, folder in enumerate(drafters):
        known.remember(folder, str(version))
        known.remember(folder, str(version))
        recalled = LastKnown(tmp_path).recall()
        assert recalled is not None
        assert (checksum(recalled[0]), recalled[1]) == (checksum(folder), str(version))
    assert len(list((tmp_path / "last").iterdir())) == 1


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "../../last.json"])
def test_a_damaged_one_is_not_recalled(tmp_path: Path, drafters: list[Path], damage: str) -> None:
    known = LastKnown(tmp_path)
    known.remember(drafters[0], "1")
    file = tmp_path / "last" / checksum(drafters[0]) / damage
    file.write_bytes(file.read_bytes()[:-10])
    assert known.recall() is None


def test_what_cannot_be_kept_is_not_remembered(tmp_path: Path, drafters: list[Path]) -> None:
    known = LastKnown(tmp_path)
    known.remember(drafters[0], "1")
    with pytest.raises(DrafterRejected):
        known.remember(tmp_path / "absent", "2")
    known.swapped(SwapRequest(path=str(tmp_path / "absent"), version="2", checksum=""))
    recalled = known.recall()
    assert recalled is not None
    assert recalled[1] == "1"


@contextmanager
def engine(folder: Path) -> Iterator[tuple[Settings, subprocess.Popen[bytes], Path]]:
    """`livedraft engine` with a registry that is not there."""
    settings = Settings(
        engine=Engine(folder=str(folder / "engine"), draft_intermediate=64),
        gateway=Gateway(port=free_port()),
        traces=Traces(url=f"spool://{folder}/traces"),
        registry=Registry(url=f"http://127.0.0.1:{free_port()}"),
    )
    config, log = write_settings(settings, folder / "engine.toml"), folder / "engine.log"
    command = [sys.executable, "-m", "livedraft.cli.main", "engine", "-c", str(config)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield settings, process, log
        finally:
            process.kill()


def eventually(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_without_a_registry_it_waits_and_still_ends_cleanly(tmp_path: Path) -> None:
    with engine(tmp_path) as (_, process, log):
        eventually(lambda: "waiting for the registry" in log.read_text(), log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()


def test_it_starts_with_what_served_last_and_remembers_a_swap(tmp_path: Path, drafters: list[Path]) -> None:
    known = LastKnown(tmp_path / "engine")
    known.remember(drafters[0], "5")
    with engine(tmp_path) as (settings, process, log):
        admin = HttpEngineAdmin(f"http://127.0.0.1:{settings.gateway.port}")

        def drafter() -> str:
            try:
                return admin.status().drafter
            except SwapFailed:
                return ""

        eventually(lambda: drafter() == "5", log)
        assert "starting with version 5, which served last" in log.read_text()
        admin.swap(SwapRequest(path=str(drafters[1]), version="6", checksum=checksum(drafters[1])))
        eventually(lambda: (known.recall() or ("", ""))[1] == "6", log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
