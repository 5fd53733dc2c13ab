from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from livedraft.contracts.errors import TraceError
from livedraft.traces.frames import HEADER_BYTES, Frame
from livedraft.traces.reader import Hole, SpoolReader
from livedraft.traces.segments import segment_bases, segment_path, usage
from livedraft.traces.spool import Fsync, RealDisk, SpoolWriter


def read_all(reader: SpoolReader) -> list[Frame | Hole]:
    return list(iter(reader.read, None))


def payloads(folder: Path, offset: int = 0) -> list[bytes]:
    records = read_all(SpoolReader(folder, offset))
    assert all(isinstance(record, Frame) for record in records), records
    return [record.payload for record in records if isinstance(record, Frame)]


def segments(folder: Path) -> list[Path]:
    return [segment_path(folder, base) for base in segment_bases(folder)]


def fill(folder: Path, count: int, segment_bytes: int = 16 << 20, retain_bytes: int = 2 << 30) -> list[bytes]:
    messages = [b"message %d" % n for n in range(count)]
    with SpoolWriter(folder, fsync="never", segment_bytes=segment_bytes, retain_bytes=retain_bytes) as spool:
        for n, message in enumerate(messages):
            assert spool.append([message]) == n
    return messages


def test_records_are_read_in_order_with_their_offsets(tmp_path: Path) -> None:
    messages = fill(tmp_path, 5)
    records = read_all(SpoolReader(tmp_path))
    assert [(r.offset, r.payload) for r in records if isinstance(r, Frame)] == list(enumerate(messages))


def test_reading_starts_at_any_offset_in_any_segment(tmp_path: Path) -> None:
    messages = fill(tmp_path, 20, segment_bytes=120)
    assert len(segments(tmp_path)) > 4
    for offset in range(21):
        assert payloads(tmp_path, offset) == messages[offset:]


def test_offsets_go_on_when_the_writer_comes_back(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    with SpoolWriter(tmp_path) as spool:
        assert spool.next_offset == 3
        assert spool.append([b"x", b"y"]) == 4
    assert payloads(tmp_path, 3) == [b"x", b"y"]


def test_a_reader_follows_a_writer_across_segments(tmp_path: Path) -> None:
    reader = SpoolReader(tmp_path / "not yet")
    assert reader.read() is None
    with SpoolWriter(tmp_path / "not yet", segment_bytes=100) as spool:
        for n in range(20):
            spool.append([b"%d" % n])
            assert reader.lag() == 1
            record = reader.read()
            assert isinstance(record, Frame)
            assert (record.offset, record.payload) == (n, b"%d" % n)
            assert reader.read() is None
            assert reader.lag() == 0


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path), pytest.raises(TraceError, match=f"process {os.getpid()} already writes"):
        SpoolWriter(tmp_path)
    SpoolWriter(tmp_path).close()


def test_a_second_writer_in_another_process_is_refused(tmp_path: Path) -> None:
    code = f"import pathlib, livedraft.traces.spool as s; s.SpoolWriter(pathlib.Path({str(tmp_path)!r}))"
    with SpoolWriter(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "already writes this spool" in other.stderr


def test_the_oldest_segments_go_first_and_the_gap_is_counted(tmp_path: Path) -> None:
    messages = fill(tmp_path, 100, segment_bytes=200, retain_bytes=1000)
    sizes = [path.stat().st_size for path in segments(tmp_path)]
    assert sum(sizes) <= 1000
    assert max(sizes) <= 200
    oldest = segment_bases(tmp_path)[0]
    reader = SpoolReader(tmp_path, 7)
    assert reader.lag() == 100 - oldest
    records = read_all(reader)
    assert [r.payload for r in records if isinstance(r, Frame)] == messages[oldest:]
    assert reader.skipped == oldest - 7
    assert usage(tmp_path).oldest == oldest
    assert usage(tmp_path).end == 100


def test_a_reader_overtaken_by_retention_counts_what_it_missed(tmp_path: Path) -> None:
    reader = SpoolReader(tmp_path)
    got = []
    with SpoolWriter(tmp_path, fsync="never", segment_bytes=200, retain_bytes=1000) as spool:
        for n in range(100):
            spool.append([b"message %d" % n])
            if n == 3:
                got += [record.offset for record in read_all(reader) if isinstance(record, Frame)]
    got += [record.offset for record in read_all(reader) if isinstance(record, Frame)]
    assert got == sorted(set(got))
    assert got[-1] == 99
    assert len(got) + reader.skipped == 100


def test_one_append_is_never_spread_over_two_segments(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path, segment_bytes=100) as spool:
        for _ in range(5):
            spool.append([b"x" * 20] * 3)
    assert segment_bases(tmp_path) == [0, 3, 6, 9, 12]


def test_a_tail_torn_at_any_byte_is_waited_at_then_cut_off(tmp_path: Path) -> None:
    messages = fill(tmp_path, 3)
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    last = len(whole) - len(messages[2]) - HEADER_BYTES
    for length in range(last, len(whole)):
        path.write_bytes(whole[:length])
        reader = SpoolReader(tmp_path)
        assert [r.payload for r in read_all(reader) if isinstance(r, Frame)] == messages[:2]
        assert reader.lag() == 0
        with SpoolWriter(tmp_path) as spool:
            assert path.stat().st_size == last
            assert spool.append([b"next"]) == 2
        assert [r.payload for r in read_all(reader) if isinstance(r, Frame)] == [b"next"]


def test_a_tail_of_zeros_is_cut_off(tmp_path: Path) -> None:
    # What some file systems leave of an append after a loss of power.
    messages = fill(tmp_path, 2)
    (path,) = segments(tmp_path)
    with path.open("ab") as file:
        file.write(bytes(100))
    assert payloads(tmp_path) == messages
    with SpoolWriter(tmp_path) as spool:
        assert spool.append([b"next"]) == 2
    assert payloads(tmp_path) == [*messages, b"next"]


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("segment_bytes", [16 << 20, 150])
def test_damage_at_any_byte_costs_one_record_and_is_reported_once(
    tmp_path: Path, segment_bytes: int, reopened: bool
) -> None:
    messages = fill(tmp_path, 8, segment_bytes=segment_bytes)
    damaged = segments(tmp_path)[0]
    whole = damaged.read_bytes()
    size = HEADER_BYTES + len(messages[0])
    for at in range(size, 2 * size):  # the second record
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        if reopened:
            SpoolWriter(tmp_path).close()
        reader = SpoolReader(tmp_path)
        first, hole, *rest = read_all(reader)
        assert isinstance(first, Frame)
        assert isinstance(hole, Hole)
        assert (hole.first, hole.last) == (1, 1)
        assert damaged.name in hole.reason
        assert [r.payload for r in rest if isinstance(r, Frame)] == messages[2:]
        assert reader.lag() == reader.skipped == reader.rewound == 0
        # One that was past it already is not sent back.
        assert payloads(tmp_path, 5) == messages[5:]


@pytest.mark.parametrize("content", [b"", b"\0" * 500, b"\xf5LDF" * 100])
def test_a_segment_of_garbage_in_the_middle_is_one_hole(tmp_path: Path, content: bytes) -> None:
    messages = fill(tmp_path, 12, segment_bytes=150)
    bases = segment_bases(tmp_path)
    segments(tmp_path)[1].write_bytes(content)
    reader = SpoolReader(tmp_path)
    records = read_all(reader)
    holes = [(r.first, r.last) for r in records if isinstance(r, Hole)]
    # An empty file is as good as none: its records were not damaged, they are gone.
    assert holes == ([(bases[1], bases[2] - 1)] if content else [])
    assert reader.skipped == (0 if content else bases[2] - bases[1])
    kept = messages[: bases[1]] + messages[bases[2] :]
    assert [r.payload for r in records if isinstance(r, Frame)] == kept


def test_a_cut_segment_in_the_middle_is_a_hole(tmp_path: Path) -> None:
    messages = fill(tmp_path, 12, segment_bytes=150)
    bases, path = segment_bases(tmp_path), segments(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-3])
    (hole,) = [r for r in read_all(SpoolReader(tmp_path)) if isinstance(r, Hole)]
    assert (hole.first, hole.last) == (bases[2] - 1, bases[2] - 1)
    assert payloads(tmp_path, bases[2]) == messages[bases[2] :]


def test_records_behind_damage_in_the_last_segment_are_not_cut_off(tmp_path: Path) -> None:
    messages = fill(tmp_path, 5)
    (path,) = segments(tmp_path)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 2] ^= 1
    path.write_bytes(data)
    with SpoolWriter(tmp_path) as spool:
        assert spool.append([b"next"]) == 5
    assert payloads(tmp_path, 1) == [*messages[1:], b"next"]


def test_an_offset_past_the_end_goes_back_to_it(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    reader = SpoolReader(tmp_path, 10)
    assert reader.read() is None
    with SpoolWriter(tmp_path) as spool:
        spool.append([b"next"])
    record = reader.read()
    assert isinstance(record, Frame)
    assert record.payload == b"next"
    assert reader.rewound == 7


def test_version_1_of_the_files_is_read_and_written_for_ever(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "spool_v1.seg"
    path = segment_path(tmp_path, 41)
    path.write_bytes(golden.read_bytes())
    assert payloads(tmp_path, 41) == [b"one", b"", bytes(range(256))]
    path.write_bytes(b"")
    with SpoolWriter(tmp_path) as spool:
        spool.append([b"one", b"", bytes(range(256))])
    assert path.read_bytes() == golden.read_bytes()


class FullDisk(RealDisk):
    """Has room for ``room`` bytes, then refuses."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.synced = 0

    def write(self, file: int, data: bytes | memoryview, /) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = super().write(file, data[: self.room])
        self.room -= written
        return written

    def sync(self, file: int, /) -> None:
        self.synced += 1


class StubbornDisk(FullDisk):
    """Does not cut a file while ``stubborn``."""

    stubborn = True

    def truncate(self, file: int, length: int, /) -> None:
        if self.stubborn:
            raise OSError(5, "Input/output error")
        super().truncate(file, length)


@pytest.mark.parametrize("room", range(0, 100, 3))
def test_a_full_disk_leaves_the_log_sound_and_offsets_true(tmp_path: Path, room: int) -> None:
    disk = FullDisk(room)
    reader = SpoolReader(tmp_path)
    with SpoolWriter(tmp_path, disk=disk) as spool:
        with pytest.raises(OSError, match="No space"):
            spool.append([b"a" * 10, b"b" * 10, b"c" * 80])
        seen = [r.payload for r in read_all(reader) if isinstance(r, Frame)]
        assert len(seen) == room // (HEADER_BYTES + 10)
        disk.room = 1 << 20
        assert spool.append([b"d"]) == len(seen)
        assert spool.stored_bytes == segments(tmp_path)[0].stat().st_size
    assert [r.payload for r in read_all(reader) if isinstance(r, Frame)] == [b"d"]
    assert payloads(tmp_path) == [*seen, b"d"]


def test_a_torn_frame_that_the_disk_would_not_cut_off_is_cut_off_later(tmp_path: Path) -> None:
    disk = StubbornDisk(room=10)
    with SpoolWriter(tmp_path, disk=disk) as spool:
        with pytest.raises(OSError, match="Input/output"):
            spool.append([b"lost"])
        assert segments(tmp_path)[0].stat().st_size == 10
        disk.room, disk.stubborn = 1000, False
        assert spool.append([b"kept"]) == 0
    assert payloads(tmp_path) == [b"kept"]


@pytest.mark.parametrize(("fsync", "synced"), [("always", 4), ("interval", 1), ("never", 0)])
def test_the_policy_says_when_to_sync(tmp_path: Path, fsync: Fsync, synced: int) -> None:
    disk, now = FullDisk(1 << 20), [0.0]
    spool = SpoolWriter(tmp_path, fsync=fsync, disk=disk, clock=lambda: now[0])
    for _ in range(4):
        now[0] += 0.4
        spool.append([b"x"])
    assert disk.synced == synced
    spool.close()


def test_a_pause_ends_durable(tmp_path: Path) -> None:
    disk, now = FullDisk(1 << 20), [0.0]
    with SpoolWriter(tmp_path, fsync="interval", disk=disk, clock=lambda: now[0]) as spool:
        spool.append([b"x"])
        spool.sync_if_due()
        assert disk.synced == 0
        now[0] = 1.0
        spool.sync_if_due()
        assert disk.synced == 1


class SpoolMachine(RuleBasedStateMachine):
    """Appends, crashes in mid-append and reopens; a reader and a fresh reader must always see the model."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.written: list[bytes] = []
        self.seen: list[bytes] = []
        self.reader = SpoolReader(self.folder)
        self.spool = self.open()

    def open(self) -> SpoolWriter:
        return SpoolWriter(self.folder, segment_bytes=150, fsync="never")

    @rule(messages=st.lists(st.binary(max_size=60), min_size=1, max_size=4))
    def append(self, messages: list[bytes]) -> None:
        self.written += messages
        assert self.spool.append(messages) == len(self.written) - 1

    @rule()
    def reopen(self) -> None:
        self.spool.close()
        self.spool = self.open()

    @rule(message=st.binary(max_size=60), data=st.data())
    def crash_in_mid_append(self, message: bytes, data: st.DataObject) -> None:
        self.spool.append([message])
        self.spool.close()
        path = segments(self.folder)[-1]
        torn = data.draw(st.integers(1, HEADER_BYTES + len(message)))
        os.truncate(path, path.stat().st_size - torn)
        self.read()
        self.spool = self.open()

    @rule()
    def read(self) -> None:
        for record in read_all(self.reader):
            assert isinstance(record, Frame)
            assert record.offset == len(self.seen)
            self.seen.append(record.payload)
        assert self.seen == self.written
        assert self.reader.lag() == 0

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def read_from_anywhere(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(0, len(self.written)))
        assert payloads(self.folder, offset) == self.written[offset:]

    @invariant()
    def usage_is_true(self) -> None:
        assert usage(self.folder).end == len(self.written)

    def teardown(self) -> None:
        self.spool.close()
        self.reader.close()


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
