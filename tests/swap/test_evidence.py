from __future__ import annotations

import threading
from pathlib import Path

import pytest
from livedraft.contracts.messages import EngineStatus
from livedraft.swap.evidence import Evidence
from livedraft.traces.memory import MemoryStream
from livedraft.traces.source import PARTITION

from . import drafts
from .fakes import FakeEngine, trace


@pytest.fixture
def status(tmp_path: Path) -> EngineStatus:
    drafts.write(tmp_path / "a")
    return FakeEngine(tmp_path / "a", "1").status()


def gather(stream: MemoryStream, keep: int = 4) -> Evidence:
    evidence = Evidence(stream.source("gate"), lambda r: r.startswith("held"), keep)
    evidence.refresh(threading.Event())
    return evidence


def names(evidence: Evidence, status: EngineStatus, trained: int | None = None, since: float = 0.0) -> list[str]:
    offsets = {} if trained is None else {PARTITION: trained}
    return [t.trace_id for t in evidence.recent(status, offsets, since)]


def test_the_most_recent_held_out_traces_are_kept(status: EngineStatus) -> None:
    stream = MemoryStream()
    for n in range(20):
        stream.offer(trace(n, request_id=f"{'held' if n % 2 else 'taught'}{n}", finished_at=1000.0 + n))
    evidence = gather(stream)
    assert names(evidence, status) == ["t13", "t15", "t17", "t19"]


def test_what_came_after_the_last_lesson_is_fair_too(status: EngineStatus) -> None:
    stream = MemoryStream()
    for n in range(20):
        stream.offer(trace(n, request_id=f"{'held' if n % 2 else 'taught'}{n}", finished_at=1000.0 + n))
    evidence = gather(stream)
    assert names(evidence, status, trained=18) == ["t15", "t17", "t18", "t19"]
    assert names(evidence, status, trained=20) == ["t13", "t15", "t17", "t19"]


def test_old_traces_and_other_targets_are_no_evidence(status: EngineStatus) -> None:
    stream = MemoryStream()
    stream.offer(trace(0, request_id="held0", finished_at=10.0))
    stream.offer(trace(1, request_id="held1", finished_at=90.0, target="big"))
    stream.damage("not a trace")
    stream.offer(trace(2, request_id="held2", finished_at=90.0))
    assert names(gather(stream), status, since=50.0) == ["t2"]


def test_a_new_process_starts_with_the_same_evidence(status: EngineStatus) -> None:
    stream = MemoryStream()
    for n in range(20):
        stream.offer(trace(n, request_id=f"{'held' if n % 3 == 0 else 'taught'}{n}", finished_at=1000.0 + n))
    before = gather(stream)
    after = gather(stream)
    assert names(after, status) == names(before, status) == ["t9", "t12", "t15", "t18"]


def test_a_set_stop_ends_the_reading() -> None:
    stream = MemoryStream()
    for n in range(200):
        stream.offer(trace(n))
    stop = threading.Event()
    stop.set()
    assert Evidence(stream.source("gate"), lambda _: True, 4).refresh(stop) == []
