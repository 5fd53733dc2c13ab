"""The server process: its command line, its end, and what a killed starter leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from livedraft.cli.ports import free_port
from livedraft.contracts import settings
from livedraft.contracts.errors import RegistryUnavailable, SettingsError
from livedraft.swap.mlflow_server import MlflowServer


class Impatient(Exception):
    """Raised by a waiting user."""


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_url_and_the_folder_become_the_command_line(tmp_path: Path) -> None:
    server = MlflowServer(settings.Registry(url="http://127.0.0.1:5123", folder=str(tmp_path)))
    command = " ".join(server.command)
    assert "--host 127.0.0.1 --port 5123" in command
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db" in command
    assert f"--artifacts-destination {tmp_path}/artifacts" in command


@pytest.mark.parametrize("url", ["http://127.0.0.1", "memory:", "https://127.0.0.1:5000", "nonsense"])
def test_a_url_that_cannot_be_served_is_refused_by_name(url: str) -> None:
    with pytest.raises(SettingsError, match=r"\[registry\] url"):
        MlflowServer(settings.Registry(url=url))


def test_a_taken_port_is_refused_before_anything_starts(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    second = MlflowServer(settings.Registry(url=mlflow_server.url, folder=str(tmp_path)))
    with pytest.raises(RegistryUnavailable, match="another server already answers"):
        second.start()
    assert not second.alive
    assert mlflow_server.healthy


def test_an_impatient_user_leaves_no_process(tmp_path: Path) -> None:
    server = MlflowServer(settings.Registry(url=f"http://127.0.0.1:{free_port()}", folder=str(tmp_path)))
    groups = []

    def give_up() -> None:
        groups.append(int((tmp_path / "server.pid").read_text()))
        raise Impatient

    with pytest.raises(Impatient):
        server.start(waiting=give_up)
    assert not server.alive
    assert not group_exists(groups[0])
    assert not (tmp_path / "server.pid").exists()


def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database")
    server = MlflowServer(settings.Registry(url=f"http://127.0.0.1:{free_port()}", folder=str(tmp_path)))
    with pytest.raises(RegistryUnavailable, match=r"server\.log"):
        server.start(timeout=60)
    assert server.log.read_text()


def test_what_a_killed_starter_left_is_ended_first(tmp_path: Path) -> None:
    port = free_port()
    # A leftover is known by our database in its command line; this one listens to nobody, but it is there.
    leftover = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", f"sqlite:///{tmp_path}/mlflow.db"],
        start_new_session=True,
    )
    while not Path(f"/proc/{leftover.pid}/cmdline").read_bytes():  # empty for a moment after Popen returns
        time.sleep(0.01)
    reaper = threading.Thread(target=leftover.wait, daemon=True)  # as init does for the orphan of a killed starter
    reaper.start()
    (tmp_path / "server.pid").write_text(str(leftover.pid))
    server = MlflowServer(settings.Registry(url=f"http://127.0.0.1:{port}", folder=str(tmp_path)))

    def give_up() -> None:
        raise Impatient

    with pytest.raises(Impatient):
        server.start(waiting=give_up)
    reaper.join(10)
    assert leftover.returncode is not None
    assert leftover.returncode < 0


def test_a_recycled_process_id_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (tmp_path / "server.pid").write_text(str(stranger.pid))
    server = MlflowServer(settings.Registry(url=f"http://127.0.0.1:{free_port()}", folder=str(tmp_path)))

    def give_up() -> None:
        raise Impatient

    try:
        with pytest.raises(Impatient):
            server.start(waiting=give_up)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
