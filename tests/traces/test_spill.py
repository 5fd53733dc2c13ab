"""Parcels on disk: in order, once, and still there after a crash."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from livedraft.contracts.errors import TraceError
from livedraft.traces.parcel import Parcel
from livedraft.traces.segments import segment_bases, segment_path
from livedraft.traces.spill import Spill
from livedraft.traces.spool import SpoolWriter


def parcel(number: int, size: int = 10) -> Parcel:
    return Parcel(key=b"k", headers=(), messages=(b"%d " % number + b"x" * size,), at=0.0)


def number(of: Parcel) -> int:
    return int(of.messages[0].split(b" ")[0])


class SpillMachine(RuleBasedStateMachine):
    """A queue with a rewind, against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.now = 0.0
        self.spill = self.open()
        self.held: list[int] = []
        self.handed: list[tuple[int, int]] = []
        self.count = 0

    def open(self) -> Spill:
        return Spill(Path(self.folder.name), max_bytes=4000, clock=lambda: self.now)

    @rule(size=st.integers(0, 600))
    def append(self, size: int) -> None:
        if self.spill.append(parcel(self.count, size)):
            self.held.append(self.count)
        else:
            assert self.spill.stored_bytes > 2000, "refused although there is room"
        self.count += 1

    @rule()
    def read(self) -> None:
        found = self.spill.read()
        expected = self.held[len(self.handed) :]
        assert (number(found.parcel) if found else None) == (expected[0] if expected else None)
        if found:
            self.handed.append((found.offset, number(found.parcel)))

    @precondition(lambda self: self.handed)
    @rule()
    def acknowledge(self) -> None:
        offset, which = self.handed.pop(0)
        self.spill.acknowledge(offset)
        assert self.held.pop(0) == which

    @rule()
    def rewind(self) -> None:
        self.spill.rewind()
        self.handed = []

    @rule(seconds=st.sampled_from([0.1, 1.0]))
    def tidy(self, seconds: float) -> None:
        self.now += seconds
        self.spill.tidy()

    @rule()
    def start_again(self) -> None:
        self.spill.close()
        self.spill.close()
        self.spill = self.open()
        self.handed = []

    @invariant()
    def holds_what_is_not_acknowledged(self) -> None:
        assert len(self.spill) == len(self.held)
        assert self.spill.stored_bytes <= 4000

    def teardown(self) -> None:
        while self.held:
            self.read()
            if self.handed:
                self.acknowledge()
        self.spill.tidy(now=True)
        assert self.spill.stored_bytes == 0, "nothing is needed any more"
        self.spill.close()
        self.folder.cleanup()


SpillMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSpill = SpillMachine.TestCase


def test_what_was_not_noted_before_a_crash_is_read_again(tmp_path: Path) -> None:
    spill = Spill(tmp_path, max_bytes=1 << 20)
    for n in range(5):
        assert spill.append(parcel(n))
    first = spill.read()
    assert first
    spill.acknowledge(first.offset)
    # As after SIGKILL: nothing is closed, and the lock is free.
    spill._writer.close()
    again = Spill(tmp_path, max_bytes=1 << 20)
    assert [number(s.parcel) for s in iter(again.read, None)] == [0, 1, 2, 3, 4]
    again.close()


def test_damage_is_passed_over_and_does_not_hold_up_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with SpoolWriter(tmp_path, segment_bytes=1) as writer:
        for record in (b"no parcel", b"nor this"):
            writer.append([record])
    spill = Spill(tmp_path, max_bytes=1 << 20)
    for n in range(3):
        spill.append(parcel(n, 100))
    last = segment_path(tmp_path, segment_bases(tmp_path)[0])
    last.write_bytes(b"\0" * last.stat().st_size)
    found = list(iter(spill.read, None))
    assert [number(s.parcel) for s in found] == [0, 1, 2]
    assert "damaged" in caplog.text
    assert "dropped" in caplog.text
    for spilled in found:
        spill.acknowledge(spilled.offset)
    assert len(spill) == 0
    spill.close()


def test_damage_alone_leaves_nothing_to_send(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path) as writer:
        writer.append([b"no parcel"])
    spill = Spill(tmp_path, max_bytes=1 << 20)
    assert len(spill) == 1
    assert spill.read() is None
    assert len(spill) == 0
    spill.close()


def test_one_process_has_it(tmp_path: Path) -> None:
    spill = Spill(tmp_path, max_bytes=1 << 20)
    with pytest.raises(TraceError, match="already writes"):
        Spill(tmp_path, max_bytes=1 << 20)
    spill.close()
