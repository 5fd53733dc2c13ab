from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts.messages import ReplayScore, Trace
from livedraft.swap.remembered import RememberedReplay

from .fakes import FakeReplay, trace

TRACES = [trace(n) for n in range(12)]
LENGTHS = {"1": 2.0, "2": 3.0, "3": 1.5}


def test_what_was_scored_is_not_scored_again() -> None:
    behind = FakeReplay(LENGTHS)
    replay = RememberedReplay(behind)
    first = replay.score(Path("/v/1"), TRACES[:4])
    again = replay.score(Path("/v/1"), TRACES[2:6])
    assert [asked for _, asked in behind.asked] == [["t0", "t1", "t2", "t3"], ["t4", "t5"]]
    assert again[:2] == first[2:]
    assert replay.score(Path("/v/1"), TRACES[2:6]) == again
    assert len(behind.asked) == 2


def test_a_trace_that_cannot_be_scored_is_not_asked_for_again() -> None:
    class Picky(FakeReplay):
        def score(self, folder: Path, traces: Sequence[Trace]) -> list[ReplayScore]:
            return super().score(folder, traces)[1:]

    behind = Picky(LENGTHS)
    replay = RememberedReplay(behind)
    assert [s.trace_id for s in replay.score(Path("/v/1"), TRACES[:2])] == ["t1"]
    assert [s.trace_id for s in replay.score(Path("/v/1"), TRACES[:2])] == ["t1"]
    assert len(behind.asked) == 1


@given(st.lists(st.tuples(st.sampled_from("123"), st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_it_answers_as_what_is_behind_it(asked: list[tuple[str, int, int]]) -> None:
    replay, behind = RememberedReplay(FakeReplay(LENGTHS), folders=2), FakeReplay(LENGTHS)
    for version, start, end in asked:
        folder = Path("/v") / version
        assert replay.score(folder, TRACES[start:end]) == behind.score(folder, TRACES[start:end])
