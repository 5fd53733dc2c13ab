"""The MLflow server that one machine runs for itself: sqlite, local artifacts, its UI.

    with MlflowServer(settings.registry) as server:     # returns once /health answers
        ...                                              # the UI is at settings.registry.url

The server runs in a process group of its own, so that one signal ends it and the workers it starts.  Its
process id is kept in ``server.pid``: when the starter was killed, the next start ends what it left behind
instead of failing on a taken port.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from livedraft.contracts import settings
from livedraft.contracts.errors import RegistryUnavailable, SettingsError

#: Of the server's process.  Telemetry would call out; job execution costs a third process and a quarter of a gigabyte.
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
#: OS niceness: serving goes first.
_NICE = 10


class MlflowServer:
    """One ``mlflow server`` process as ``settings`` describes it.  Raises SettingsError for a url without a port."""

    def __init__(self, settings: settings.Registry) -> None:
        parts = urllib.parse.urlsplit(settings.url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise SettingsError(f"[registry] url: {settings.url!r}, expected http://host:port")
        self.url = settings.url.rstrip("/")
        self.folder = Path(settings.folder).resolve()
        self.log = self.folder / "server.log"
        self._address = (parts.hostname, parts.port)
        self._pid_file = self.folder / "server.pid"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        """The command line."""
        host, port = self._address
        return [
            *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", f"{self.folder}/artifacts"),
        ]

    @property
    def healthy(self) -> bool:
        """Whether ``/health`` answers."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.url}/health", timeout=2.0) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    @property
    def alive(self) -> bool:
        """Whether the process that ``start`` started still runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 120.0, waiting: Callable[[], None] = lambda: None) -> None:
        """Start and wait until ``/health`` answers (about 20 s the first time, 6 s later).

        ``waiting`` runs several times a second meanwhile; what it raises stops the server.  Raises
        RegistryUnavailable when the port is taken, the process ends or ``timeout`` seconds pass.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_leftover()
        if self.healthy:
            raise RegistryUnavailable(f"{self.url}: another server already answers there; choose another port")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )
        self._pid_file.write_text(f"{self._process.pid}\n")
        # Its workers inherit it: a registry that answers a little later holds no token up.
        os.setpriority(os.PRIO_PROCESS, self._process.pid, max(_NICE, os.getpriority(os.PRIO_PROCESS, 0)))
        try:
            deadline = time.monotonic() + timeout
            while not self.healthy:
                if self._process.poll() is not None:
                    raise RegistryUnavailable(f"mlflow server ended with {self._process.returncode}; see {self.log}")
                if time.monotonic() > deadline:
                    raise RegistryUnavailable(f"mlflow server: no answer within {timeout:.0f} s; see {self.log}")
                waiting()
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = 10.0) -> None:
        """End the whole process group: politely, then by force.  Safe to call twice."""
        if self._process is None:
            return
        _end_group(self._process.pid, timeout, ended=lambda: self._reaped)
        self._process.wait()
        self._process = None
        self._pid_file.unlink(missing_ok=True)

    @property
    def _reaped(self) -> bool:
        """Whether our child has ended; asking also reaps it, without which its group would never be empty."""
        return self._process is None or self._process.poll() is not None

    def _end_leftover(self) -> None:
        """End the server that a killed starter left in this folder, known by its command line."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return
        if f"{self.folder}/mlflow.db".encode() in command:
            _end_group(pid, 10.0)
        self._pid_file.unlink(missing_ok=True)

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _end_group(group: int, timeout: float, ended: Callable[[], bool] = lambda: False) -> None:
    """SIGTERM to every process of ``group``, and SIGKILL to those that are left after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < deadline:
            ended()
            os.killpg(group, 0)  # raises once nobody is left
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
