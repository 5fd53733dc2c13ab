"""The composition as a test reads it, and tools that must not be missing where it counts."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from .composition import ROOT, Image, read_compose, read_env, read_images

SECRETS = {"LIVEDRAFT_ADMIN_KEY": "admin", "LIVEDRAFT_ENGINE_KEY": "between", "GRAFANA_PASSWORD": "secret"}


@pytest.fixture(scope="session")
def composed() -> dict[str, Any]:
    """compose.yaml with .env.example filled in."""
    return read_compose(read_env(ROOT / ".env.example") | SECRETS)


GPU = {
    "COMPOSE_PROFILES": "gpu",
    "LIVEDRAFT_ENGINE_URL": "sglang+http://sglang:30000",
    "LIVEDRAFT_DRAFTER": "/var/lib/livedraft/drafter/initial",
    "LIVEDRAFT_TARGET": "Qwen/Qwen3-8B",
}


@pytest.fixture(scope="session")
def composed_gpu() -> dict[str, Any]:
    """The same with the values of the profile gpu."""
    return read_compose(read_env(ROOT / ".env.example") | SECRETS | GPU)


@pytest.fixture(scope="session")
def images() -> dict[str, Image]:
    """Targets of the Dockerfile."""
    return read_images((ROOT / "Dockerfile").read_text())


def tool(name: str) -> str:
    """Path of a program, beside our interpreter or on the PATH; without it the test is skipped, but fails in CI."""
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return str(beside)
    if found := shutil.which(name):
        return found
    if os.environ.get("LIVEDRAFT_CI"):
        pytest.fail(f"{name} is not installed; .ci/run installs it")
    pytest.skip(f"{name} is not installed")
