from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from livedraft.contracts.errors import SettingsError, TraceError
from livedraft.contracts.messages import Trace
from livedraft.traces.arrays import tensor_bytes
from livedraft.traces.redaction import PatternRedaction
from livedraft.traces.source import SpoolSource
from livedraft.traces.spool import RealDisk, SpoolWriter
from livedraft.traces.spool_sink import SpoolSink


class FailingDisk(RealDisk):
    """Refuses every write while ``full``."""

    full = True

    def write(self, file: int, data: bytes | memoryview, /) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(file, data)


class StuckDisk(RealDisk):
    """Holds every write until ``release``."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.writing = threading.Event()

    def write(self, file: int, data: bytes | memoryview, /) -> int:
        self.writing.set()
        self.release.wait(60)
        return super().write(file, data)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_ids(folder: Path) -> list[str]:
    return [item.item.trace_id for item in SpoolSource(folder, "check").poll() if isinstance(item.item, Trace)]


def test_every_trace_taken_is_written_by_the_time_close_returns(tmp_path: Path, make_trace: Any) -> None:
    sink = SpoolSink(lambda: SpoolWriter(tmp_path), message_bytes=1024)
    traces = [make_trace(seed, rounds=seed) for seed in range(30)]
    assert all(sink.offer(trace) for trace in traces)
    sink.close()
    sink.close()
    assert [item.item for item in SpoolSource(tmp_path, "g").poll()] == traces
    counters = sink.counters()
    assert (counters.offered, counters.written, counters.waiting, counters.dropped) == (30, 30, 0, {})
    assert counters.waiting_bytes == 0
    assert 0 < counters.written_bytes < sum(path.stat().st_size for path in tmp_path.glob("*.seg"))


def test_a_full_disk_costs_traces_and_no_errors_and_comes_back(
    tmp_path: Path, make_trace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FailingDisk()
    sink = SpoolSink(lambda: SpoolWriter(tmp_path, disk=disk), retry_s=0.05)
    for seed in range(5):
        assert sink.offer(make_trace(seed))
    eventually(lambda: sink.counters().waiting == 0)
    assert sink.counters().dropped == {"disk": 5}
    assert "written again" not in caplog.text
    disk.full = False
    time.sleep(0.1)
    sink.offer(make_trace(9))
    sink.close()
    assert sink.counters().written == 1
    assert "written again" in caplog.text
    assert read_ids(tmp_path) == ["t9"]


def test_a_folder_that_cannot_be_used_at_first_is_tried_again(tmp_path: Path, make_trace: Any) -> None:
    folder = tmp_path / "spool"
    folder.write_text("in the way")
    sink = SpoolSink(lambda: SpoolWriter(folder), retry_s=0.05)
    sink.offer(make_trace(1))
    eventually(lambda: sink.counters().dropped == {"disk": 1})
    folder.unlink()
    time.sleep(0.1)
    sink.offer(make_trace(2))
    sink.close()
    assert read_ids(folder) == ["t2"]


#: Lets no file pass 3000 bytes, writes until that costs traces, lifts the limit, writes on.
LIMITED = """
import importlib.util, resource, sys, time
from pathlib import Path
from livedraft.traces.spool_sink import SpoolSink
from livedraft.traces.spool import SpoolWriter

spec = importlib.util.spec_from_file_location("traces_conftest", sys.argv[2])
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
sink = SpoolSink(lambda: SpoolWriter(Path(sys.argv[1])), retry_s=0.05)
for seed in range(10):
    assert sink.offer(conftest.build_trace(seed))
while sink.counters().waiting:
    time.sleep(0.01)
before = sink.counters()
assert before.written and before.dropped["disk"], before
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
time.sleep(0.1)
sink.offer(conftest.build_trace(99))
sink.close()
print(before.written)
"""


def test_a_file_that_may_not_grow_is_survived_by_a_real_process(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY, "the test lifts its limit again"
    conftest = str(Path(__file__).with_name("conftest.py"))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), conftest], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert read_ids(tmp_path) == [*(f"t{seed}" for seed in range(int(done.stdout))), "t99"]
    assert "traces are dropped" in done.stderr


def test_a_full_buffer_drops_at_once_and_never_waits_for_the_disk(tmp_path: Path, make_trace: Any) -> None:
    disk = StuckDisk()
    trace = make_trace(1, rounds=30)
    sink = SpoolSink(lambda: SpoolWriter(tmp_path, disk=disk), buffer_bytes=3 * tensor_bytes(trace))
    assert sink.offer(trace)
    assert disk.writing.wait(30)
    # The one being written counts, too.
    assert [sink.offer(trace) for _ in range(4)] == [True, True, False, False]
    counters = sink.counters()
    assert (counters.offered, counters.waiting, counters.dropped) == (5, 3, {"full": 2})
    assert counters.waiting_bytes == 3 * tensor_bytes(trace)
    disk.release.set()
    sink.close()
    assert sink.counters().written == 3


def test_closing_gives_up_what_a_stuck_disk_does_not_take(tmp_path: Path, make_trace: Any) -> None:
    disk = StuckDisk()
    sink = SpoolSink(lambda: SpoolWriter(tmp_path, disk=disk))
    for seed in range(3):
        sink.offer(make_trace(seed))
    assert disk.writing.wait(30)
    sink.close(timeout=0.05)
    assert sink.counters().dropped == {"closed": 2}
    assert not sink.offer(make_trace(4))
    assert sink.counters().dropped == {"closed": 3}
    disk.release.set()
    sink.close()
    assert sink.counters().written == 1


def test_a_second_sink_on_a_spool_is_refused_at_once(tmp_path: Path) -> None:
    sink = SpoolSink(lambda: SpoolWriter(tmp_path))
    with pytest.raises(TraceError, match="already writes"):
        SpoolSink(lambda: SpoolWriter(tmp_path))
    sink.close()


def test_a_message_limit_too_small_to_work_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"traces\.message_bytes is 100, expected at least 1024"):
        SpoolSink(lambda: SpoolWriter(tmp_path), message_bytes=100)


def test_a_trace_without_consent_is_never_written(tmp_path: Path, make_trace: Any) -> None:
    sink = SpoolSink(lambda: SpoolWriter(tmp_path))
    sink.offer(make_trace(1, consent=False))
    sink.offer(make_trace(2))
    sink.close()
    assert sink.counters().dropped == {"consent": 1}
    assert read_ids(tmp_path) == ["t2"]


def test_private_traces_are_dropped_and_counted(tmp_path: Path, make_trace: Any) -> None:
    def decode(tokens: Sequence[int]) -> str:
        return "write to jane@example.org" if len(tokens) > 20 else "hello"

    sink = SpoolSink(lambda: SpoolWriter(tmp_path), redactor=PatternRedaction(decode))
    sink.offer(make_trace(1, rounds=40))
    sink.offer(make_trace(2, rounds=1))
    sink.close()
    assert sink.counters().dropped == {"redacted": 1}
    assert read_ids(tmp_path) == ["t2"]


def test_a_redactor_that_fails_lets_nothing_through_and_does_not_end_the_sink(tmp_path: Path, make_trace: Any) -> None:
    def decode(tokens: Sequence[int]) -> str:
        if len(tokens) > 20:
            raise KeyError("tokenizer bug")
        return ""

    sink = SpoolSink(lambda: SpoolWriter(tmp_path), redactor=PatternRedaction(decode))
    sink.offer(make_trace(1, rounds=40))
    sink.offer(make_trace(2, rounds=1))
    sink.close()
    assert sink.counters().dropped == {"error": 1}
    assert read_ids(tmp_path) == ["t2"]


def test_many_threads_may_offer(tmp_path: Path, make_trace: Any) -> None:
    sink = SpoolSink(lambda: SpoolWriter(tmp_path))
    trace = make_trace(1)

    def offer(thread: int) -> None:
        for n in range(50):
            sink.offer(msgspec.structs.replace(trace, trace_id=f"{thread}-{n}"))

    threads = [threading.Thread(target=offer, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    ids = read_ids(tmp_path)
    assert len(ids) == len(set(ids)) == 200
    for n in range(4):
        mine = [trace_id for trace_id in ids if trace_id.startswith(f"{n}-")]
        assert mine == [f"{n}-{k}" for k in range(50)]


def test_offering_is_cheap(tmp_path: Path, make_trace: Any) -> None:
    sink = SpoolSink(lambda: SpoolWriter(tmp_path, disk=FailingDisk()))
    trace = make_trace(1, rounds=100, width=300)
    began = time.perf_counter()
    for _ in range(200):
        sink.offer(trace)
    # About 5 microseconds each on a quiet machine; encoding one takes over 100.
    assert time.perf_counter() - began < 200 * 0.002
    sink.close()
