"""What a registry promises, asked of the one in memory and of a real MLflow server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from livedraft.contracts import checkpoint, settings
from livedraft.contracts.errors import NotFound, RegistryUnavailable, SettingsError
from livedraft.contracts.messages import Decision
from livedraft.contracts.ports import Registry
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.swap.mlflow_registry import MlflowRegistry
from livedraft.swap.mlflow_server import MlflowServer
from livedraft.swap.registry import connect
from msgspec.structs import replace

from . import drafts


@pytest.fixture(params=["memory", "mlflow"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "memory":
        return MemoryRegistry(tmp_path / "registry")
    server: MlflowServer = request.getfixturevalue("mlflow_server")
    return MlflowRegistry(server.url, f"drafter-{uuid.uuid4().hex[:8]}")


def test_an_empty_registry_has_nothing(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.decisions() == []
    assert registry.resolve("live") is None


def test_a_published_version_keeps_its_lineage(registry: Registry, tmp_path: Path) -> None:
    manifest = drafts.write(tmp_path / "a", 1)
    first = registry.publish(tmp_path / "a", manifest, {"loss": 2.0})
    child = replace(drafts.MANIFEST, parent=first.version, offsets={"0": 7}, tokens_trained=900, steps=3)
    manifest = drafts.write(tmp_path / "b", 2, child)
    before = time.time() - 2
    second = registry.publish(tmp_path / "b", manifest, {"loss": 1.0, "accept_length/python": 2.5})
    assert second.checksum == checkpoint.checksum(manifest.tensors)
    assert second.parent == first.version
    assert second.created_at > before
    assert second.metrics == {"loss": 1.0, "accept_length/python": 2.5}
    assert second.tags == {
        "target": "tiny",
        "target_revision": "r1",
        "tokenizer_hash": "tok",
        "tokens_trained": "900",
        "steps": "3",
        "lineage": checkpoint.lineage(manifest.tensors),
        "vocabulary": "kept",
        "offsets": '{"0": 7}',
    }
    assert registry.versions() == [second, first]
    assert registry.get(second.version) == second


def test_the_same_weights_keep_their_version(registry: Registry, tmp_path: Path) -> None:
    manifest = drafts.write(tmp_path / "a")
    first = registry.publish(tmp_path / "a", manifest, {"loss": 2.0})
    assert registry.publish(tmp_path / "a", manifest, {"loss": 2.0}) == first
    assert registry.versions() == [first]


def test_what_is_fetched_is_what_was_published(registry: Registry, tmp_path: Path) -> None:
    manifest = drafts.write(tmp_path / "a", 1)
    version = registry.publish(tmp_path / "a", manifest, {})
    folder = registry.fetch(version.version, tmp_path / "fetched")
    assert folder.parent == tmp_path / "fetched"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()
    }
    assert registry.fetch(version.version, tmp_path / "fetched") == folder
    assert list((tmp_path / "fetched").iterdir()) == [folder]


def test_an_alias_points_at_one_version(registry: Registry, tmp_path: Path) -> None:
    a, b = (registry.publish(tmp_path / n, drafts.write(tmp_path / n, s), {"loss": 1.0}) for s, n in enumerate("ab"))
    registry.point("candidate", a.version)
    registry.point("live", a.version)
    assert registry.get(a.version).aliases == ("candidate", "live")
    registry.point("live", b.version)
    live = registry.resolve("live")
    assert live == replace(b, aliases=("live",), metrics={})
    assert [v.aliases for v in registry.versions()] == [("live",), ("candidate",)]


def test_measurements_accumulate_and_the_latest_step_shows(registry: Registry, tmp_path: Path) -> None:
    version = registry.publish(tmp_path / "a", drafts.write(tmp_path / "a"), {"loss": 2.0}).version
    registry.record(version, {"accept_length": 2.5}, step=3)
    registry.record(version, {"accept_length": 2.0, "goodput": 1.1}, step=1)
    registry.record(version, {})
    assert registry.get(version).metrics == {"loss": 2.0, "accept_length": 2.5, "goodput": 1.1}


def test_decisions_come_back_in_order_with_their_evidence(registry: Registry) -> None:
    decisions = [
        Decision(action="promote", reason=f"better {n}", candidate=str(n + 1), live=str(n), evidence={"lower": 0.1 + n})
        for n in range(4)
    ] + [Decision(action="rollback", reason="worse", candidate="4", live="3", at=12.5)]
    for decision in decisions:
        registry.decide(decision)
    assert registry.decisions() == decisions


def test_the_same_decision_twice_is_one(registry: Registry) -> None:
    decision = Decision(action="keep", reason="as predicted", candidate="2", at=1.0)
    registry.decide(decision)
    registry.decide(decision)
    registry.decide(replace(decision, at=2.0))
    assert registry.decisions() == [decision, replace(decision, at=2.0)]


@pytest.mark.parametrize("version", ["7", "seven", ""])
def test_an_unknown_version_is_not_found(registry: Registry, tmp_path: Path, version: str) -> None:
    registry.publish(tmp_path / "a", drafts.write(tmp_path / "a"), {})
    with pytest.raises(NotFound):
        registry.get(version)
    with pytest.raises(NotFound):
        registry.point("live", version)
    with pytest.raises(NotFound):
        registry.record(version, {"loss": 1.0})
    with pytest.raises(NotFound):
        registry.fetch(version, tmp_path / "fetched")
    assert registry.resolve("live") is None
    assert not (tmp_path / "fetched").exists() or not list((tmp_path / "fetched").iterdir())


def test_a_silent_server_is_unavailable_within_its_bound(tmp_path: Path, silent_server: str) -> None:
    registry = MlflowRegistry(silent_server, timeout=1.0)
    began = time.monotonic()
    with pytest.raises(RegistryUnavailable, match=silent_server):
        registry.resolve("live")
    assert time.monotonic() - began < 15  # MLflow's own patience is minutes


def test_an_absent_server_is_unavailable(tmp_path: Path, closed_url: str) -> None:
    registry = MlflowRegistry(closed_url)
    manifest = drafts.write(tmp_path / "a")
    asks: list[Callable[[], object]] = [
        lambda: registry.resolve("live"),
        lambda: registry.versions(),
        lambda: registry.get("1"),
        lambda: registry.point("live", "1"),
        lambda: registry.record("1", {"loss": 1.0}),
        lambda: registry.fetch("1", tmp_path / "fetched"),
        lambda: registry.publish(tmp_path / "a", manifest, {}),
        lambda: registry.decide(Decision(action="keep", reason="")),
        lambda: registry.decisions(),
    ]
    for ask in asks:
        with pytest.raises(RegistryUnavailable):
            ask()
    assert list((tmp_path / "fetched").iterdir()) == []


def test_the_url_chooses_the_adapter() -> None:
    assert isinstance(connect(settings.Registry(url="memory:")), MemoryRegistry)
    assert isinstance(connect(settings.Registry(url="http://127.0.0.1:5000")), MlflowRegistry)
    with pytest.raises(SettingsError, match="ftp://x"):
        connect(settings.Registry(url="ftp://x"))
