from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from kafka import KafkaConsumer, TopicPartition
from livedraft.cli.announcing import AnnouncingRegistry
from livedraft.contracts.messages import Decision, DrafterVersion, Manifest
from livedraft.contracts.ports import Announcements
from livedraft.contracts.settings import Kafka, Traces
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.traces.urls import open_announcements

MakeSettings = Callable[..., Kafka]
GOLDEN = Path(__file__).parent / "golden"

VERSION = DrafterVersion(
    version="7",
    checksum="c7",
    aliases=("candidate",),
    parent="6",
    created_at=1.5,
    metrics={"loss": 0.5},
    tags={"target": "tiny"},
)
DECISION = Decision(
    action="promote", reason="lower bound 1.02", candidate="7", live="6", evidence={"lower": 1.02}, at=2.5
)


def messages(address: str, topic: str, count: int) -> list[tuple[bytes, bytes, dict[str, bytes]]]:
    consumer = KafkaConsumer(bootstrap_servers=address)
    consumer.assign([TopicPartition(topic, 0)])
    consumer.seek_to_beginning()
    found: list[tuple[bytes, bytes, dict[str, bytes]]] = []
    for _ in range(50):
        for batch in consumer.poll(200).values():
            found += [(record.key, record.value, dict(record.headers)) for record in batch]
        if len(found) >= count:
            break
    consumer.close()
    return found


def test_candidates_and_decisions_are_announced_as_published(broker_address: str, kafka_settings: MakeSettings) -> None:
    settings = kafka_settings()
    announcer = open_announcements(Traces(url=f"kafka://{broker_address}"), settings)
    assert announcer
    announcer.candidate(VERSION)
    announcer.decision(DECISION)
    announcer.close(10)
    announcer.close()
    drafts = messages(broker_address, f"{settings.prefix}.drafts", 1)
    swaps = messages(broker_address, f"{settings.prefix}.swaps", 1)
    assert drafts == [(b"7", (GOLDEN / "draft_v1.json").read_bytes(), {"schema": b"1.1"})]
    assert swaps == [(b"7", (GOLDEN / "decision_v1.json").read_bytes(), {"schema": b"1.1"})]


def test_golden_announcements_still_decode() -> None:
    assert msgspec.json.decode((GOLDEN / "draft_v1.json").read_bytes(), type=DrafterVersion) == VERSION
    assert msgspec.json.decode((GOLDEN / "decision_v1.json").read_bytes(), type=Decision) == DECISION


def test_without_a_broker_nobody_waits() -> None:
    announcer = open_announcements(Traces(url="kafka://127.0.0.1:1"), Kafka())
    assert announcer
    began = time.monotonic()
    for _ in range(2000):
        announcer.candidate(VERSION)
    assert time.monotonic() - began < 5
    announcer.close(0.2)
    assert time.monotonic() - began < 20


def test_a_spool_has_no_place_for_them() -> None:
    assert open_announcements(Traces(url="spool:///anywhere"), Kafka()) is None


class Heard:
    """``Announcements`` kept in a list."""

    def __init__(self) -> None:
        self.all: list[DrafterVersion | Decision] = []

    def candidate(self, version: DrafterVersion) -> None:
        self.all.append(version)

    def decision(self, decision: Decision) -> None:
        self.all.append(decision)

    def close(self, timeout: float = 2.0) -> None:
        pass


def test_a_registry_announces_what_it_has_taken(tmp_path: Path) -> None:
    heard = Heard()
    announcements: Announcements = heard
    registry = AnnouncingRegistry(MemoryRegistry(tmp_path / "registry"), announcements)
    (tmp_path / "drafter").mkdir()
    manifest = Manifest(tensors={}, target="t", target_revision="r", tokenizer_hash="h")
    version = registry.publish(tmp_path / "drafter", manifest, {"loss": 1.0})
    registry.decide(DECISION)
    registry.point("live", version.version)
    assert heard.all == [version, DECISION]
    live = registry.resolve("live")
    assert live
    assert live.version == version.version
    assert registry.decisions() == [DECISION]
    assert [v.version for v in registry.versions()] == [version.version]
