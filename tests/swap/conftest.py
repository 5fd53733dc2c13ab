"""A real MLflow server for the session, on a free port."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from livedraft.cli.ports import free_port
from livedraft.contracts import settings
from livedraft.swap.mlflow_server import MlflowServer


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = str(tmp_path_factory.mktemp("mlflow"))
    with MlflowServer(settings.Registry(url=f"http://127.0.0.1:{free_port()}", folder=folder)) as server:
        yield server


@pytest.fixture
def closed_url() -> str:
    """Where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
