"""Which registry a url means."""

from __future__ import annotations

import tempfile
from pathlib import Path

from livedraft.contracts import ports, settings
from livedraft.contracts.errors import SettingsError
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.swap.mlflow_registry import MlflowRegistry


def connect(settings: settings.Registry) -> ports.Registry:
    """The registry that ``settings.url`` names; nothing is contacted yet.  Raises SettingsError for another scheme."""
    if settings.url == "memory:":
        return MemoryRegistry(Path(tempfile.mkdtemp(prefix="livedraft-registry-")))
    if settings.url.startswith(("http://", "https://")):
        return MlflowRegistry(settings.url, settings.model)
    raise SettingsError(f"[registry] url: {settings.url!r}, expected http://host:port or memory:")
