from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from livedraft.contracts.errors import CorruptRecord, StreamUnavailable, TraceError, UnsupportedSchema
from livedraft.contracts.messages import SCHEMA_MAJOR, SCHEMA_MINOR, Array, Features, Trace
from livedraft.kernels.features import pack_rows, unpack_rows
from livedraft.traces.arrays import feature_values, from_numpy
from livedraft.traces.codec import ExtendedTrace, decode, decode_all, encode, to_json

GOLDEN = Path(__file__).parent / "golden"
HEADER = struct.Struct("<4sHHH")
replace = msgspec.structs.replace


@given(data=st.data())
def test_a_trace_comes_back_as_it_was(data: st.DataObject, any_trace: st.SearchStrategy[Trace]) -> None:
    trace = data.draw(any_trace)
    assert decode(encode(trace)) == trace


@settings(max_examples=400)
@given(data=st.data())
def test_no_mutation_of_a_record_escapes_as_another_error(
    data: st.DataObject, any_trace: st.SearchStrategy[Trace]
) -> None:
    record = bytearray(encode(data.draw(any_trace)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(record) - 1))
        match data.draw(st.sampled_from(["set", "insert", "delete", "cut"])):
            case "set":
                record[at] = data.draw(st.integers(0, 255))
            case "insert":
                record[at:at] = data.draw(st.binary(max_size=8))
            case "delete" if len(record) > 1:
                del record[at]
            case "cut" if at:
                del record[at:]
    try:
        trace = decode(bytes(record))
    except (CorruptRecord, UnsupportedSchema):
        return
    assert decode(encode(trace)) == trace


@given(st.binary(max_size=200), st.sampled_from([b"", b"LDTR", HEADER.pack(b"LDTR", SCHEMA_MAJOR, SCHEMA_MINOR, 0)]))
def test_garbage_is_corrupt(garbage: bytes, start: bytes) -> None:
    with pytest.raises((CorruptRecord, UnsupportedSchema)):
        decode(start + garbage)


def test_every_truncation_is_corrupt(make_trace: Any) -> None:
    record = encode(make_trace(3))
    for length in range(len(record)):
        with pytest.raises(CorruptRecord):
            decode(record[:length])


def test_deep_nesting_is_corrupt() -> None:
    with pytest.raises(CorruptRecord):
        decode(HEADER.pack(b"LDTR", SCHEMA_MAJOR, SCHEMA_MINOR, 0) + b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0")


def with_fields(trace: Trace, new: dict[str, Any], *, minor: int = SCHEMA_MINOR + 1) -> bytes:
    """The record of a newer writer: ``new`` maps "field" or "part.field" to a value."""
    record = encode(trace)
    magic, major, _, flags = HEADER.unpack_from(record)
    fields = msgspec.msgpack.decode(record[HEADER.size :])
    for name, value in new.items():
        *parts, last = name.split(".")
        holder = fields
        for part in parts:
            holder = holder[part]
        holder[last] = value
    return HEADER.pack(magic, major, minor, flags) + msgspec.msgpack.encode(fields)


def test_fields_of_a_newer_minor_version_are_kept(make_trace: Any) -> None:
    trace = make_trace(5)
    new = {"colour": {"deep": [1, b"x"]}, "rounds.entropy": [0.5], "features.noise": 2, "sampling.min_p": 0.1}
    decoded = decode(with_fields(trace, new))
    assert isinstance(decoded, ExtendedTrace)
    assert decoded.rounds == trace.rounds
    assert decoded.schema_minor == SCHEMA_MINOR + 1
    again = encode(decoded)
    assert decode(again) == decoded
    fields = msgspec.msgpack.decode(again[HEADER.size :])
    assert fields["colour"] == new["colour"]
    assert fields["rounds"]["entropy"] == [0.5]
    assert fields["features"]["noise"] == 2
    assert fields["sampling"]["min_p"] == 0.1
    assert HEADER.unpack_from(again)[2] == SCHEMA_MINOR + 1


def test_the_header_tells_the_version_also_where_defaults_are_left_out(make_trace: Any) -> None:
    trace = decode(with_fields(make_trace(1), {}))
    assert (trace.schema_major, trace.schema_minor) == (SCHEMA_MAJOR, SCHEMA_MINOR + 1)


def test_a_newer_minor_version_that_cannot_be_read_is_unsupported_not_corrupt(make_trace: Any) -> None:
    with pytest.raises(UnsupportedSchema):
        decode(with_fields(make_trace(1), {"finish_reason": "bored"}))
    with pytest.raises(CorruptRecord):
        decode(with_fields(make_trace(1), {"finish_reason": "bored"}, minor=SCHEMA_MINOR))


@pytest.mark.parametrize(("at", "value"), [(4, SCHEMA_MAJOR + 1), (4, 0), (8, 2)])
def test_an_unknown_major_version_or_flag_is_unsupported(make_trace: Any, at: int, value: int) -> None:
    record = bytearray(encode(make_trace(1)))
    struct.pack_into("<H", record, at, value)
    with pytest.raises(UnsupportedSchema):
        decode(bytes(record))


def test_features_shrink_on_the_wire(make_trace: Any) -> None:
    # Hidden states: normal, with a few channels much larger than the rest.
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 384), np.float32) * rng.lognormal(0, 1, 384).astype(np.float32)
    trace = make_trace(1, rounds=100)
    trace = replace(trace, features=Features(mode="inline", layers=(1,), values=from_numpy(values, "bf2")))
    record = encode(trace)
    assert len(record) < 0.92 * values.size * 2
    assert decode(record) == trace


def test_features_of_8_bits_take_little_more_than_half(make_trace: Any) -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal((200, 384), np.float32) * rng.lognormal(0, 1, 384).astype(np.float32))
    wide = Features(mode="inline", layers=(1,), values=from_numpy(values.numpy(), "bf2"))
    sizes = [len(encode(replace(make_trace(1), features=f))) for f in (wide, packed_features(values))]
    assert sizes[1] < 0.6 * sizes[0]


def packed_features(values: torch.Tensor) -> Features:
    packed, scale = pack_rows(values)
    bits = from_numpy(packed.view(torch.uint8).numpy(), "e4m3")
    return Features(mode="inline", layers=(1,), values=bits, scale=from_numpy(scale.numpy(), "f4"))


@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-(2.0**99), 2.0**99, width=32),
    )
)
def test_features_of_8_bits_come_back_within_a_sixteenth_or_a_step_of_their_row(
    make_trace: Any, values: np.ndarray
) -> None:
    """Through the wire, and as the kernel that packed them unpacks them, bit for bit."""
    features = packed_features(torch.from_numpy(values))
    text = from_numpy(np.zeros(len(values), int), "i4")
    trace = replace(make_trace(1, rounds=0), output=text, features=features)
    found = feature_values(decode(encode(trace)).features)
    packed, scale = pack_rows(torch.from_numpy(values))
    np.testing.assert_array_equal(found, unpack_rows(packed, scale, torch.float32).numpy())
    largest = np.abs(values).max(1, keepdims=True)
    allowed = np.maximum(np.abs(values) / 16, largest / 448 * 2.0**-10) * (1 + 1e-5)
    # Below the least normal float32 a scale itself is a multiple of its steps.
    assert (np.abs(found - values) <= np.maximum(allowed, 2.0**-126)).all()


def test_a_size_that_lies_does_not_allocate(make_trace: Any) -> None:
    trace = make_trace(1)
    record = with_fields(trace, {"features.values": ["bf2", [1 << 40, 3], b"x"]}, minor=SCHEMA_MINOR)
    with pytest.raises(CorruptRecord, match="at most"):
        decode(record)


def rounds_with(trace: Trace, **fields: Array) -> Trace:
    return replace(trace, rounds=replace(trace.rounds, **fields))


def features_with(trace: Trace, **fields: Any) -> Trace:
    return replace(trace, features=replace(trace.features, **fields))


#: One thing wrong with ``small``, by the field that the error must name.
WRONG: dict[str, Callable[[Trace], Trace]] = {
    "prompt": lambda t: replace(t, prompt=from_numpy([-1, 2], "i4")),
    "output": lambda t: replace(t, output=from_numpy([1.0, 2.0], "f4")),
    "started_at": lambda t: replace(t, started_at=float("nan")),
    "sampling.temperature": lambda t: replace(t, sampling=replace(t.sampling, temperature=-1.0)),
    "top_temperature": lambda t: replace(t, top_temperature=0.0),
    "rounds.root": lambda t: rounds_with(t, root=from_numpy([4], "i4")),
    "rounds.size": lambda t: rounds_with(t, size=from_numpy([2], "i4")),
    "rounds.drafter": lambda t: rounds_with(t, drafter=from_numpy([2], "i2")),
    "rounds.tokens": lambda t: rounds_with(t, tokens=from_numpy([5, 6, -7], "i4")),
    "rounds.parents": lambda t: rounds_with(t, parents=from_numpy([-1, 0, 2], "i2")),
    "rounds.logprobs": lambda t: rounds_with(t, logprobs=from_numpy([0.0, float("nan"), 0.0], "f4")),
    "rounds.accepted": lambda t: rounds_with(t, accepted=from_numpy([0, 1, 0], "u1")),
    "rounds.bonus": lambda t: rounds_with(t, bonus=from_numpy([8, 9], "i4")),
    "rounds.top_ids": lambda t: rounds_with(t, top_ids=from_numpy([[1, 2]] * 3, "i4")),
    "rounds.top_logprobs": lambda t: rounds_with(t, top_logprobs=from_numpy(np.zeros((4, 3)), "f4")),
    "rounds.tail": lambda t: rounds_with(t, tail=from_numpy([0, 0, 0, 1.5], "f4")),
    "features.start": lambda t: features_with(t, start=1),
    "features.layers": lambda t: features_with(t, layers=(1, 2)),
    "features.values": lambda t: features_with(t, values=from_numpy(np.full((4, 3), np.inf), "bf2")),
    "features.reference": lambda t: features_with(t, mode="store"),
    "features.scale": lambda t: features_with(t, scale=from_numpy(np.ones(4), "f4")),
}


@pytest.fixture
def small(make_trace: Any) -> Trace:
    trace: Trace = make_trace(1, rounds=1)
    return replace(
        trace,
        prompt=from_numpy([1, 2], "i4"),
        output=from_numpy([5, 9], "i4"),
        rounds=replace(
            trace.rounds,
            root=from_numpy([1], "i4"),
            size=from_numpy([3], "i4"),
            drafter=from_numpy([1], "i2"),
            tokens=from_numpy([5, 6, 7], "i4"),
            parents=from_numpy([-1, 0, 1], "i2"),
            logprobs=from_numpy([-1.0, -2.0, -3.0], "f4"),
            accepted=from_numpy([1, 0, 0], "u1"),
            bonus=from_numpy([9], "i4"),
            top_ids=from_numpy([[1, 2]] * 4, "i4"),
            top_logprobs=from_numpy([[-1.0, -2.0]] * 4, "f4"),
            tail=from_numpy([0.1] * 4, "f4"),
        ),
        features=Features(mode="inline", layers=(1, 2, 3), values=from_numpy(np.ones((4, 3)), "bf2")),
    )


@pytest.mark.parametrize("field", WRONG)
def test_an_inconsistent_trace_is_corrupt_and_names_the_field(small: Trace, field: str) -> None:
    assert decode(encode(small)) == small
    with pytest.raises(CorruptRecord, match=field):
        decode(encode(WRONG[field](small)))


#: More that is wrong with ``small``, beside ``WRONG``: (field, how).
MORE_WRONG: list[tuple[str, Callable[[Trace], Trace]]] = [
    ("rounds.root", lambda t: two_rounds(t, root=from_numpy([2, 1], "i4"))),
    ("rounds.root", lambda t: two_rounds(t, root=from_numpy([1, 1], "i4"))),
    ("rounds.root", lambda t: rounds_with(t, root=from_numpy([-1], "i4"))),
    ("rounds.size", lambda t: two_rounds(t, size=from_numpy([4, -1], "i4"))),
    ("rounds.size", lambda t: rounds_with(t, size=from_numpy([4], "i4"))),
    ("rounds.drafter", lambda t: rounds_with(t, drafter=from_numpy([-1], "i2"))),
    ("rounds.bonus", lambda t: rounds_with(t, bonus=from_numpy([-9], "i4"))),
    ("rounds.parents", lambda t: rounds_with(t, parents=from_numpy([-2, 0, 1], "i2"))),
    ("rounds.accepted", lambda t: rounds_with(t, accepted=from_numpy([2, 0, 0], "u1"))),
    ("rounds.accepted", lambda t: rounds_with(t, accepted=from_numpy([1, 0, 1], "u1"))),
    ("rounds.top_ids", lambda t: rounds_with(t, top_ids=from_numpy([[1, 2]] * 3 + [[1, -2]], "i4"))),
    ("rounds.top_ids", lambda t: rounds_with(t, top_ids=Array(dtype="i4", shape=(4, 2), data=b"1234"))),
    ("rounds.top_logprobs", lambda t: rounds_with(t, top_logprobs=from_numpy([[-1.0, 0.5]] * 4, "f4"))),
    ("rounds.tail", lambda t: rounds_with(t, tail=from_numpy([0, 0, 0, float("nan")], "f4"))),
    ("rounds.tail", lambda t: rounds_with(t, tail=from_numpy([0, 0, 0, -0.5], "f4"))),
    ("features.values", lambda t: features_with(t, values=from_numpy(np.full((4, 3), np.nan), "f4"))),
    ("features.values", lambda t: features_with(t, values=from_numpy(np.full((4, 3), -np.inf), "bf2"))),
    ("features.values", lambda t: features_with(t, values=None)),
    ("features.start", lambda t: features_with(t, start=-1)),
    ("features.scale", lambda t: eight_bits(t, scale=None)),
    ("features.scale", lambda t: eight_bits(t, scale=from_numpy(np.ones(3), "f4"))),
    ("features.scale", lambda t: eight_bits(t, scale=from_numpy([1, 1, 0, 1], "f4"))),
    ("features.scale", lambda t: eight_bits(t, scale=from_numpy([1, 1, np.nan, 1], "f4"))),
    ("features.scale", lambda t: eight_bits(t, scale=from_numpy([1, 1, 1e37, 1], "f4"))),
    ("features.values", lambda t: eight_bits(t, values=from_numpy(np.full((4, 3), 0x7F), "e4m3"))),
    ("features.values", lambda t: eight_bits(t, values=from_numpy(np.full((4, 3), 0xFF), "e4m3"))),
    ("features.values", lambda t: features_with(t, values=from_numpy(np.ones((4, 3), int), "i4"))),
]


def eight_bits(trace: Trace, **fields: Any) -> Trace:
    """``small`` with features of 8 bits."""
    packed = {"values": from_numpy(np.full((4, 3), 0x7E), "e4m3"), "scale": from_numpy(np.full(4, 0.5), "f4")}
    return features_with(trace, **(packed | fields))


def two_rounds(trace: Trace, **fields: Array) -> Trace:
    """``small`` in two rounds, of three nodes and of none."""
    two = {
        "root": from_numpy([1, 2], "i4"),
        "size": from_numpy([3, 0], "i4"),
        "drafter": from_numpy([1, 9], "i2"),  # nobody's: the round did not speculate
        "bonus": from_numpy([9, 9], "i4"),
        "top_ids": from_numpy([[1, 2]] * 5, "i4"),
        "top_logprobs": from_numpy([[-1.0, -2.0]] * 5, "f4"),
        "tail": from_numpy([0.1] * 5, "f4"),
    }
    return rounds_with(trace, **(two | fields))


@pytest.mark.parametrize(("field", "wrong"), MORE_WRONG)
def test_whatever_is_inconsistent_is_refused(small: Trace, field: str, wrong: Callable[[Trace], Trace]) -> None:
    for right in (two_rounds(small), eight_bits(small)):
        assert decode(encode(right)) == right
    with pytest.raises(CorruptRecord, match=field):
        decode(encode(wrong(small)))


def test_traces_decoded_together_fail_one_by_one(small: Trace, make_trace: Any) -> None:
    """Each is refused for what it is, and no other for it; what ends one trace does not begin the next."""
    good = [small, two_rounds(small), make_trace(3, rounds=0), make_trace(4, mode="recompute"), small]
    assert decode_all(map(encode, good)) == good
    wrong = [*WRONG.values(), *(how for _, how in MORE_WRONG)]
    mixed = [encode(how(small)) for how in wrong]
    for place, message in ((0, b"no trace"), (3, encode(good[1])), (len(wrong), encode(good[2]))):
        mixed.insert(place, message)
    passing = StreamUnavailable("passes")
    alone = [passing, *map(attempt, mixed)]
    together = decode_all([passing, *mixed])
    assert [str(found) if isinstance(found, TraceError) else found for found in together] == [
        str(found) if isinstance(found, TraceError) else found for found in alone
    ]
    assert [type(found) for found in together] == [type(found) for found in alone]
    assert sum(isinstance(found, Trace) for found in together) == 2


def test_many_traces_are_decoded_together_as_one_by_one(make_trace: Any) -> None:
    """Beyond what is validated at once."""
    traces = [make_trace(seed, rounds=60, width=600) for seed in range(30)]
    messages = [encode(trace) for trace in traces]
    assert sum(map(len, messages)) > 3 << 20
    messages[17] = messages[17][:-1]
    found = decode_all(messages)
    assert isinstance(found[17], CorruptRecord)
    assert [*found[:17], *found[18:]] == [*traces[:17], *traces[18:]]


@given(data=st.data())
def test_together_or_alone_any_records_come_to_the_same(
    data: st.DataObject, any_trace: st.SearchStrategy[Trace]
) -> None:
    """Records of traces with bytes of theirs changed."""
    records = [bytearray(encode(data.draw(any_trace))) for _ in range(data.draw(st.integers(1, 4)))]
    for record in records:
        for at in data.draw(st.lists(st.integers(0, len(record) - 1), max_size=2)):
            record[at] = data.draw(st.integers(0, 255))
    messages = [bytes(record) for record in records]
    alone = [str(found) if isinstance(found, TraceError) else encode(found) for found in map(attempt, messages)]
    together = [str(found) if isinstance(found, TraceError) else encode(found) for found in decode_all(messages)]
    assert together == alone


def attempt(message: bytes) -> Trace | TraceError:
    try:
        return decode(message)
    except TraceError as error:
        return error


def test_siblings_cannot_both_be_accepted(small: Trace) -> None:
    parents, accepted = from_numpy([-1, -1, 1], "i2"), from_numpy([1, 1, 0], "u1")
    trace = replace(small, rounds=replace(small.rounds, parents=parents, accepted=accepted))
    with pytest.raises(CorruptRecord, match="one path"):
        decode(encode(trace))


def test_json_summarises_arrays_or_prints_them_whole(small: Trace) -> None:
    summary = to_json(small)
    assert summary["rounds"]["top_ids"] == "i4[4,2]"
    whole = to_json(small, whole=True)
    assert whole["rounds"]["tokens"] == [5, 6, 7]
    assert whole["features"]["values"] == [[1.0] * 3] * 4
    json.dumps([summary, whole])


@pytest.mark.parametrize("name", ["trace_v1", "trace_v1_1"])
def test_version_1_is_read_for_ever(name: str) -> None:
    trace = decode((GOLDEN / f"{name}.bin").read_bytes())
    told = json.loads(json.dumps(to_json(trace, whole=True)))
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    if name == "trace_v1":
        assert told["features"].pop("scale") is None  # a field of 1.1
    assert told == golden
