from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from livedraft.contracts.errors import SettingsError, TraceError
from livedraft.contracts.messages import DeadLetter, Delivery, Trace
from livedraft.contracts.ports import TraceSink, TraceSource
from livedraft.traces.chunks import split
from livedraft.traces.codec import encode
from livedraft.traces.memory import MemoryStream
from livedraft.traces.replay import replay
from livedraft.traces.source import SpoolSource
from livedraft.traces.spool import SpoolWriter
from livedraft.traces.spool_sink import SpoolSink

Open = Callable[[], TraceSource]


@pytest.fixture(params=["spool", "memory"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[TraceSink, Open]:
    """A sink, and how to open a source of group "g": the port's contract holds for both adapters."""
    if request.param == "memory":
        memory = MemoryStream()
        return memory, lambda: memory.source("g")
    return SpoolSink(lambda: SpoolWriter(tmp_path, segment_bytes=4000)), lambda: SpoolSource(tmp_path, "g")


def ids(items: list[Delivery]) -> list[str]:
    return [item.item.trace_id for item in items if isinstance(item.item, Trace)]


def test_traces_arrive_in_order(stream: tuple[TraceSink, Open], make_trace: Any) -> None:
    sink, open_source = stream
    traces = [make_trace(seed) for seed in range(10)]
    assert all(sink.offer(trace) for trace in traces)
    sink.close()
    source = open_source()
    assert source.lag() == 10
    first = source.poll(limit=4)
    assert source.lag() == 6
    rest = source.poll()
    assert [item.item for item in first + rest] == traces
    assert [item.offset for item in first + rest] == list(range(10))
    assert {item.partition for item in first + rest} == {"0"}
    assert source.poll() == []
    source.close()
    source.close()


def test_a_consumer_that_starts_again_goes_on_where_it_committed(
    stream: tuple[TraceSink, Open], make_trace: Any
) -> None:
    sink, open_source = stream
    for seed in range(6):
        sink.offer(make_trace(seed))
    sink.close()
    source = open_source()
    assert source.committed() == {}
    used = source.poll(limit=2)
    source.poll(limit=2)  # polled, and lost with the consumer
    source.commit({"0": used[-1].offset + 1})
    source.close()
    again = open_source()
    assert again.committed() == {"0": 2}
    assert ids(again.poll()) == ["t2", "t3", "t4", "t5"]
    again.seek({"0": 4})
    assert ids(again.poll()) == ["t4", "t5"]
    again.seek({})
    assert len(again.poll()) == 6


def test_poll_waits_for_the_first_item_and_no_longer_than_asked(
    stream: tuple[TraceSink, Open], make_trace: Any
) -> None:
    sink, open_source = stream
    source = open_source()
    assert source.poll(timeout=0.05) == []
    later = threading.Timer(0.1, sink.offer, [make_trace(1)])
    later.start()
    assert ids(source.poll(timeout=20)) == ["t1"]
    later.join()
    sink.close()


def test_replay_walks_to_the_end_and_leaves_the_group_alone(stream: tuple[TraceSink, Open], make_trace: Any) -> None:
    sink, open_source = stream
    for seed in range(100):
        sink.offer(make_trace(seed))
    sink.close()
    source = open_source()
    assert [item.offset for item in replay(source, {"0": 5})] == list(range(5, 100))
    assert len(list(replay(source))) == 100
    assert source.committed() == {}


def test_replay_can_follow(stream: tuple[TraceSink, Open], make_trace: Any) -> None:
    sink, open_source = stream
    items = replay(open_source(), follow=True)
    for seed in range(3):
        sink.offer(make_trace(seed))
        assert ids([next(items)]) == [f"t{seed}"]
    sink.close()


def test_bad_records_come_as_dead_letters_and_the_rest_is_read_on(tmp_path: Path, make_trace: Any) -> None:
    good = encode(make_trace(1))
    newer = good[:4] + b"\x09" + good[5:]
    with SpoolWriter(tmp_path) as spool:
        for message in (b"garbage", good, newer, b"LDCH nonsense", good):
            spool.append([message])
    items = SpoolSource(tmp_path, "g").poll()
    assert [type(item.item) for item in items] == [DeadLetter, Trace, DeadLetter, DeadLetter, Trace]
    letter = items[0].item
    assert isinstance(letter, DeadLetter)
    assert (letter.offset, letter.head) == (0, b"garbage")
    assert "schema 9.1" in getattr(items[2].item, "reason", "")


def test_damage_comes_as_one_dead_letter_and_resuming_after_it_is_right(tmp_path: Path, make_trace: Any) -> None:
    with SpoolWriter(tmp_path, segment_bytes=1) as spool:
        for seed in range(6):
            spool.append([encode(make_trace(seed))])
    for base in (2, 3):
        (tmp_path / f"{base:020d}.seg").write_bytes(b"\0" * 99)
    source = SpoolSource(tmp_path, "g")
    items = source.poll()
    assert [(item.offset, type(item.item)) for item in items if isinstance(item.item, DeadLetter)] == [
        (2, DeadLetter),
        (3, DeadLetter),
    ]
    assert ids(items) == ["t0", "t1", "t4", "t5"]
    source.seek({"0": items[3].offset + 1})
    assert ids(source.poll()) == ["t4", "t5"]


def test_a_long_trace_has_the_offset_of_its_last_chunk(tmp_path: Path, make_trace: Any) -> None:
    traces = [make_trace(seed, rounds=20) for seed in range(3)]
    with SpoolWriter(tmp_path) as spool:
        for trace in traces:
            spool.append(split(encode(trace), key="k", trace_id=trace.trace_id, message_bytes=1024))
    source = SpoolSource(tmp_path, "g")
    items = source.poll(limit=1)
    assert items[0].offset > 0
    source.seek({"0": items[0].offset + 1})
    assert [item.item for item in source.poll()] == traces[1:]


def test_a_trace_cut_off_by_a_crash_does_not_disturb_the_next(tmp_path: Path, make_trace: Any) -> None:
    chunks = split(encode(make_trace(1, rounds=20)), key="k", trace_id="t", message_bytes=1024)
    with SpoolWriter(tmp_path) as spool:
        spool.append(chunks[:-1])
        spool.append([encode(make_trace(2))])
    assert ids(SpoolSource(tmp_path, "g").poll()) == ["t2"]


@pytest.mark.parametrize("group", ["", "../up", "a/b", ".hidden", "a b"])
def test_a_group_that_is_no_file_name_is_refused(tmp_path: Path, group: str) -> None:
    with pytest.raises(SettingsError, match="consumer group"):
        SpoolSource(tmp_path, group)


def test_an_offset_file_that_was_tampered_with_is_refused_by_name(tmp_path: Path) -> None:
    SpoolSource(tmp_path, "g").commit({"0": 1})
    (tmp_path / "groups" / "g.json").write_text("{")
    with pytest.raises(TraceError, match=r"g\.json"):
        SpoolSource(tmp_path, "g")


def test_groups_are_independent(tmp_path: Path) -> None:
    SpoolSource(tmp_path, "a").commit({"0": 1})
    assert SpoolSource(tmp_path, "b").committed() == {}


def test_a_full_memory_stream_drops_and_counts(make_trace: Any) -> None:
    stream = MemoryStream(capacity=2)
    assert [stream.offer(make_trace(seed)) for seed in range(3)] == [True, True, False]
    stream.damage("test")  # past the capacity: it is no trace
    assert (stream.offered, stream.dropped) == (3, 1)
    assert [type(item.item) for item in stream.source("g").poll()] == [Trace, Trace, DeadLetter]
    stream.close()
    assert not stream.offer(make_trace(4))
