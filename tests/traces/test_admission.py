from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.messages import Generation
from livedraft.traces.admission import admit, held_out


def request(number: int = 1, *, traced: bool = True) -> Generation:
    return Generation(request_id=f"r{number}", prompt=(1,), tenant="acme", traced=traced)


def test_a_willing_request_is_captured() -> None:
    assert admit(request()).captured


def test_the_reason_is_told() -> None:
    assert admit(request(traced=False)).reason == "request opted out"
    assert admit(request(), opted_out=("acme",)).reason == "tenant opted out"
    assert admit(request(), sample_rate=0.0).reason == "not sampled"


def test_the_sample_has_the_size_asked_for_and_is_the_same_each_time() -> None:
    chosen = [admit(request(n), sample_rate=0.3).captured for n in range(10_000)]
    assert 2800 < sum(chosen) < 3200
    assert chosen == [admit(request(n), sample_rate=0.3).captured for n in range(10_000)]


def test_what_is_held_out_does_not_depend_on_what_is_sampled() -> None:
    sampled = [n for n in range(10_000) if admit(request(n), sample_rate=0.3).captured]
    share = sum(held_out(f"r{n}", 0.1) for n in sampled) / len(sampled)
    assert 0.08 < share < 0.12


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_a_superset(request_id: str, one: float, other: float) -> None:
    assert held_out(request_id, min(one, other)) <= held_out(request_id, max(one, other))
    assert held_out(request_id, 1.0)
    assert not held_out(request_id, 0.0)


def test_the_split_is_the_same_in_every_version() -> None:
    assert [n for n in range(40) if held_out(f"r{n}", 0.1)] == [4, 17, 20, 27, 34, 38]
