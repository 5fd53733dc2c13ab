"""A registry that tells of what it was given."""

from __future__ import annotations

from pathlib import Path

from livedraft.contracts.messages import Decision, DrafterVersion, Manifest
from livedraft.contracts.ports import Announcements, Registry


class AnnouncingRegistry:
    """``Registry`` that announces each candidate and decision once the registry behind it has it."""

    def __init__(self, registry: Registry, announcements: Announcements) -> None:
        self._registry = registry
        self._announcements = announcements

    def publish(self, folder: Path, manifest: Manifest, metrics: dict[str, float]) -> DrafterVersion:
        """As ``Registry.publish``."""
        version = self._registry.publish(folder, manifest, metrics)
        self._announcements.candidate(version)
        return version

    def decide(self, decision: Decision) -> None:
        """As ``Registry.decide``."""
        self._registry.decide(decision)
        self._announcements.decision(decision)

    def resolve(self, alias: str) -> DrafterVersion | None:
        """As ``Registry.resolve``."""
        return self._registry.resolve(alias)

    def point(self, alias: str, version: str) -> None:
        """As ``Registry.point``."""
        self._registry.point(alias, version)

    def versions(self) -> list[DrafterVersion]:
        """As ``Registry.versions``."""
        return self._registry.versions()

    def get(self, version: str) -> DrafterVersion:
        """As ``Registry.get``."""
        return self._registry.get(version)

    def fetch(self, version: str, into: Path) -> Path:
        """As ``Registry.fetch``."""
        return self._registry.fetch(version, into)

    def record(self, version: str, metrics: dict[str, float], step: int = 0) -> None:
        """As ``Registry.record``."""
        self._registry.record(version, metrics, step)

    def decisions(self) -> list[Decision]:
        """As ``Registry.decisions``."""
        return self._registry.decisions()
