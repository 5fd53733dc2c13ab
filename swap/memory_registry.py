"""The registry in memory, checkpoint folders copied below a folder: for tests and throw-away runs."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from livedraft.contracts import checkpoint
from livedraft.contracts.errors import NotFound
from livedraft.contracts.messages import Decision, DrafterVersion, Manifest
from livedraft.swap.lineage import lineage_tags
from msgspec.structs import replace


class MemoryRegistry:
    """``ports.Registry`` for one process; what it holds ends with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions: dict[str, DrafterVersion] = {}
        self._aliases: dict[str, str] = {}
        self._measured: dict[str, dict[str, tuple[int, float]]] = {}
        self._decisions: list[Decision] = []

    def publish(self, folder: Path, manifest: Manifest, metrics: dict[str, float]) -> DrafterVersion:
        """As ``ports.Registry``.  Weights that are registered already keep their version."""
        checksum = checkpoint.checksum(manifest.tensors)
        for known in self._versions.values():
            if known.checksum == checksum:
                return self.get(known.version)
        version = str(len(self._versions) + 1)
        shutil.copytree(folder, self.folder / version)
        self._versions[version] = DrafterVersion(
            version=version,
            checksum=checksum,
            parent=manifest.parent,
            created_at=time.time(),
            tags=lineage_tags(manifest),
        )
        self.record(version, metrics)
        return self.get(version)

    def resolve(self, alias: str) -> DrafterVersion | None:
        """As ``ports.Registry``."""
        version = self._aliases.get(alias)
        return None if version is None else replace(self.get(version), metrics={})

    def point(self, alias: str, version: str) -> None:
        """As ``ports.Registry``."""
        self._aliases[alias] = self.get(version).version

    def versions(self) -> list[DrafterVersion]:
        """As ``ports.Registry``."""
        return [self.get(version) for version in reversed(self._versions)]

    def get(self, version: str) -> DrafterVersion:
        """As ``ports.Registry``."""
        if version not in self._versions:
            raise NotFound(f"version {version!r}")
        return replace(
            self._versions[version],
            aliases=tuple(sorted(a for a, v in self._aliases.items() if v == version)),
            metrics={name: value for name, (_, value) in self._measured.get(version, {}).items()},
        )

    def fetch(self, version: str, into: Path) -> Path:
        """As ``ports.Registry``: ``into / version``, copied beside it and renamed when complete."""
        folder = into / self.get(version).version
        if not folder.exists():
            into.mkdir(parents=True, exist_ok=True)
            half = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=into))
            try:
                shutil.copytree(self.folder / version, half / version).rename(folder)
            finally:
                shutil.rmtree(half, ignore_errors=True)
        return folder

    def record(self, version: str, metrics: dict[str, float], step: int = 0) -> None:
        """As ``ports.Registry``."""
        measured = self._measured.setdefault(self.get(version).version, {})
        for name, value in metrics.items():
            if step >= measured.get(name, (step, 0.0))[0]:
                measured[name] = (step, value)

    def decide(self, decision: Decision) -> None:
        """As ``ports.Registry``.  The same decision again changes nothing."""
        if decision not in self._decisions:
            self._decisions.append(decision)

    def decisions(self) -> list[Decision]:
        """As ``ports.Registry``."""
        return list(self._decisions)
