from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.errors import TraceError
from livedraft.contracts.messages import Trace
from livedraft.traces.chunks import Assembler
from livedraft.traces.codec import decode
from livedraft.traces.parcel import Parcel, dump, load, pack, repack

parcels = st.builds(
    Parcel,
    key=st.binary(max_size=20),
    headers=st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=9)), max_size=4).map(tuple),
    messages=st.lists(st.binary(max_size=300), max_size=5).map(tuple),
    at=st.floats(0, 1e12),
)


@given(parcels)
def test_a_parcel_comes_back_from_the_record_it_is_dumped_to(parcel: Parcel) -> None:
    assert load(dump(parcel)) == parcel
    assert parcel.size == len(b"".join(parcel.messages))


@given(parcels, st.data())
def test_half_a_record_is_refused(parcel: Parcel, data: st.DataObject) -> None:
    whole = dump(parcel)
    with pytest.raises(msgspec.DecodeError):
        load(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.data())
def test_a_packed_trace_is_what_its_messages_assemble_to(
    any_trace: st.SearchStrategy[Trace], data: st.DataObject
) -> None:
    trace, limit = data.draw(any_trace), data.draw(st.integers(1024, 5000))
    parcel = pack(trace, limit)
    assert parcel.key == trace.request_id.encode()
    assert all(len(message) <= limit for message in parcel.messages)
    assembler = Assembler()
    *rest, last = [assembler.add(message) for message in parcel.messages]
    assert rest == [None] * len(rest)
    assert last is not None
    assert decode(last) == trace
    assert repack(parcel.messages) == parcel


def test_what_is_not_one_whole_trace_is_not_repacked(make_trace: Any) -> None:
    messages = pack(make_trace(1, rounds=30), 1024).messages
    for wrong in (messages[:-1], messages[1:], (), (b"garbage",), messages + messages):
        with pytest.raises(TraceError):
            repack(wrong)


def test_headers_say_what_it_takes_to_route_a_message_unread(make_trace: Any) -> None:
    trace = make_trace(1, tenant="é", target="qwen", target_revision="abc", drafters=("3", "4"))
    assert dict(pack(trace, 1 << 20).headers) == {
        "schema": b"1.1",
        "target": b"qwen@abc",
        "drafter": b"4",
        "tenant": "é".encode(),
    }


def test_text_that_is_not_unicode_does_not_stop_a_trace(make_trace: Any) -> None:
    parcel = pack(make_trace(1, tenant="t"), 1 << 20)
    odd = msgspec.structs.replace(make_trace(1), request_id="\udc80")
    with pytest.raises(UnicodeEncodeError):  # the codec's business: the sink counts it as an error of ours
        pack(odd, 1 << 20)
    assert parcel.key
