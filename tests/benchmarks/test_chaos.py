"""The kill campaign cleans up after itself, whoever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def commands(group: int) -> list[str]:
    """Command lines of a process group's members."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(place.name)) == group:
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended meanwhile
            continue
    return [command for command in found if command]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_whoever_ends_it_ends_its_broker_and_the_others(tmp_path: Path, by: signal.Signals) -> None:
    # The interpreter heeds SIGINT even where whoever runs the tests does not.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from livedraft.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "bench", "chaos", "--kills", "1000", "--json", str(tmp_path / "report.json")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    group = process.pid
    try:
        deadline = time.monotonic() + 90
        while not all(any(name in c for c in commands(group)) for name in ("tansu", "moto", "producer", "trainer")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, commands(group)
            time.sleep(0.1)
        process.send_signal(by)
        assert process.wait(60) == 128 + by, (tmp_path / "log").read_text()
        deadline = time.monotonic() + 10
        while left := commands(group):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    finally:
        if commands(group):
            os.killpg(group, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "report.json").exists()
