from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.errors import CorruptRecord, SettingsError
from livedraft.traces.chunks import MAGIC, MIN_MESSAGE_BYTES, Assembler, split


def cut(record: bytes, name: str = "a", message_bytes: int = 64) -> list[bytes]:
    return split(record, key=f"key-{name}", trace_id=f"trace-{name}", message_bytes=message_bytes)


@given(st.binary(max_size=5000), st.integers(60, 2000), st.text(max_size=8))
def test_a_record_comes_back_and_no_message_is_too_long(record: bytes, limit: int, key: str) -> None:
    record = b"r" + record
    messages = split(record, key=key, trace_id="t", message_bytes=limit)
    assert all(len(message) <= limit for message in messages)
    assembler = Assembler()
    *early, last = [assembler.add(message) for message in messages]
    assert early == [None] * len(early)
    assert last == record


def test_the_largest_chunks_fill_a_message_and_no_more() -> None:
    messages = cut(b"x" * 300_000, message_bytes=100_000)
    assert 99_980 < max(map(len, messages)) <= 100_000


def test_a_limit_without_room_for_data_is_refused() -> None:
    with pytest.raises(SettingsError, match="message_bytes"):
        cut(b"x" * 100, message_bytes=10)
    assert cut(b"x" * 5000, message_bytes=MIN_MESSAGE_BYTES)


def test_interleaved_records_come_back() -> None:
    one, two = cut(b"1" * 100, "one"), cut(b"2" * 100, "two")
    assembler = Assembler()
    mixed = [message for pair in zip(one, two, strict=True) for message in pair]
    assert [r for m in mixed if (r := assembler.add(m))] == [b"1" * 100, b"2" * 100]


def test_chunks_seen_before_are_ignored() -> None:
    first, second, *rest = cut(b"x" * 100)
    assembler = Assembler()
    repeated = [first, second, first, second, *rest, second, *rest]
    assert [r for m in repeated if (r := assembler.add(m))] == [b"x" * 100]
    assert assembler.incomplete == 0


def test_a_record_with_a_chunk_missing_is_given_up_and_the_next_comes_through() -> None:
    first, _, third, *_ = cut(b"x" * 100)
    assembler = Assembler()
    assert [assembler.add(m) for m in (first, third)] == [None, None]
    assert assembler.incomplete == 1
    assert [r for m in cut(b"y" * 100) if (r := assembler.add(m))] == [b"y" * 100]


def test_a_record_whose_writer_died_expires() -> None:
    assembler = Assembler(max_messages=3)
    assembler.add(cut(b"x" * 100)[0])
    for _ in range(3):
        assert assembler.add(b"whole") == b"whole"
    assert assembler.incomplete == 0
    assembler.add(b"whole")
    assert assembler.incomplete == 1


def test_what_waits_is_bounded_in_bytes() -> None:
    assembler = Assembler(max_bytes=100)
    for name in range(10):
        assembler.add(cut(b"x" * 1000, str(name), 90)[0])
    assert assembler.incomplete >= 7
    # The latest is still open.
    assert [r for m in cut(b"x" * 60, "small") if (r := assembler.add(m))] == [b"x" * 60]


@given(st.binary(max_size=60))
def test_a_chunk_that_is_none_is_corrupt_or_waits(garbage: bytes) -> None:
    with contextlib.suppress(CorruptRecord):
        assert Assembler().add(MAGIC + garbage) is None


def test_a_chunk_past_its_count_is_corrupt() -> None:
    with pytest.raises(CorruptRecord, match="index 2 of 2"):
        Assembler().add(MAGIC + b"\x95\xa1k\xa1t\x02\x02\xc4\x00")
