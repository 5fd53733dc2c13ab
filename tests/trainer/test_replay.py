"""What is drawn from replay, and how often."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from livedraft.contracts.messages import Array, Features, Rounds, Sampling, Trace
from livedraft.trainer.replay import Replay

TraceMaker = Callable[..., Trace]


@pytest.fixture(scope="module")
def named() -> Callable[[int, str], Trace]:
    """Traces that differ in name and domain only."""
    empty = Array(dtype="i4", shape=(0,), data=b"")
    rounds = Rounds(**dict.fromkeys(Rounds.__struct_fields__, empty))

    def make(number: int, domain: str = "a") -> Trace:
        name = f"{domain}{number}"
        return Trace(
            trace_id=name,
            request_id=name,
            engine="e",
            target="t",
            target_revision="r",
            tokenizer_hash="h",
            drafters=(),
            started_at=0.0,
            finished_at=0.0,
            sampling=Sampling(),
            top_temperature=1.0,
            finish_reason="stop",
            prompt=empty,
            output=empty,
            rounds=rounds,
            features=Features(),
            domain=domain,
        )

    return make


def replay(capacity: int = 8, max_uses: int = 3, fresh: float = 0.5, rehearse: float = 0.25) -> Replay:
    return Replay(capacity=capacity, max_uses=max_uses, fresh_share=fresh, rehearse_share=rehearse)


def test_no_trace_is_used_more_than_max_uses_times(named: Callable[..., Trace]) -> None:
    rng, kept = random.Random(0), replay(capacity=20)
    for i in range(8):
        kept.add(named(i), rng)
    drawn: Counter[str] = Counter()
    while kept.can_sample(4):
        batch = [t.trace_id for t in kept.sample(4, rng)]
        assert len(set(batch)) == 4
        drawn.update(batch)
    assert max(drawn.values()) == 3
    assert sum(count < 3 for count in drawn.values()) < 4  # fewer are left than fill a batch
    assert len(drawn) == 8


def test_used_traces_are_drawn_alike_not_the_latest_over_and_over(named: Callable[..., Trace]) -> None:
    rng, kept = random.Random(0), replay(capacity=80, max_uses=1000, rehearse=0.0)
    for i in range(20):
        kept.add(named(i), rng)
    while any(uses == 0 for _, uses in kept.state().recent):
        kept.sample(4, rng)
    for _ in range(100):
        kept.sample(4, rng)
    kept.add(named(20), rng)
    drawn = Counter(t.trace_id for _ in range(200) for t in kept.sample(4, rng))
    assert drawn["a20"] / 200 == pytest.approx(4 / 21, abs=0.1)


def test_new_traces_fill_half_a_batch_while_used_ones_fill_the_rest(named: Callable[..., Trace]) -> None:
    rng, kept = random.Random(0), replay(capacity=40)
    for i in range(4):
        kept.add(named(i), rng)
    kept.sample(4, rng)
    for i in range(10, 16):
        kept.add(named(i), rng)
    batch = {t.trace_id for t in kept.sample(4, rng)}
    assert len(batch & {"a10", "a11"}) == 2
    assert len(batch & {"a0", "a1", "a2", "a3"}) == 2


def test_turned_over_it_begins_with_what_is_new_and_rehearses_the_rest(named: Callable[..., Trace]) -> None:
    rng, kept = random.Random(0), replay(capacity=40, max_uses=9)
    for i in range(12):
        kept.add(named(i, "old"), rng)
    for _ in range(4):
        kept.sample(4, rng)
    for i in range(6):
        kept.add(named(i, "new"), rng)
    kept.turn_over(2, rng)
    state = kept.state()
    assert [name for name, uses in state.recent if uses] == ["old8", "old9"]
    assert {name for name, uses in state.recent if not uses} == {
        *(f"old{i}" for i in range(10, 12)),
        *(f"new{i}" for i in range(6)),
    }
    assert set(state.memory["old"]) == {f"old{i}" for i in range(8)}
    assert len(list(kept)) == 18


def test_the_first_of_a_sample_are_the_new_ones(named: Callable[..., Trace]) -> None:
    rng, kept = random.Random(0), replay(capacity=40, rehearse=0.0)
    for i in range(4):
        kept.add(named(i), rng)
    kept.sample(4, rng)
    assert kept.new == 4
    for i in range(10, 13):
        kept.add(named(i), rng)
    batch = [t.trace_id for t in kept.sample(4, rng)]
    assert (kept.new, batch[:2]) == (2, ["a10", "a11"])
    assert kept.can_sample(4)
    assert not kept.can_sample(4, new=True)
    batch = [t.trace_id for t in kept.sample(4, rng, fresh_share=1.0)]
    assert (kept.new, batch[0]) == (1, "a12")


def test_an_old_domain_is_rehearsed_while_a_new_one_streams_in(named: Callable[..., Trace]) -> None:
    rng, kept = random.Random(0), replay(capacity=16)
    for i in range(20):
        kept.add(named(i, "old"), rng)
    drawn: Counter[str] = Counter()
    for i in range(100):
        kept.add(named(i, "new"), rng)
        if kept.can_sample(4):
            drawn.update(t.domain for t in kept.sample(4, rng))
    assert 0.05 < drawn["old"] / drawn.total() < 0.3
    assert {t.domain for t in kept} == {"old", "new"}


def test_memory_is_an_even_sample_of_what_a_domain_ever_had(named: Callable[..., Trace]) -> None:
    seen: Counter[int] = Counter()
    for seed in range(300):
        rng, kept = random.Random(seed), replay(capacity=8)
        for i in range(40):
            kept.add(named(i), rng)
        held = [int(t.trace_id[1:]) for t in kept]
        seen.update(n for n in held if n < 36)
    # 36 left for memory, 4 of them are held: each with probability 1/9
    for part in range(4):
        assert sum(seen[n] for n in range(part * 9, part * 9 + 9)) == pytest.approx(300, rel=0.2)


def test_traces_that_nobody_had_time_for_are_counted(named: Callable[..., Trace]) -> None:
    rng, kept = random.Random(0), replay(capacity=4)
    for i in range(5):
        kept.add(named(i), rng)
    assert kept.unused == 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.sampled_from("abc"), st.none()), max_size=60), st.integers(0, 59), st.integers(0, 99))
def test_a_restored_replay_goes_on_as_the_first(
    named: Callable[..., Trace], events: list[str | None], cut: int, seed: int
) -> None:
    def play(kept: Replay, rng: random.Random, start: int, end: int) -> list[str]:
        drawn = []
        for i, event in enumerate(events[start:end], start):
            if event:
                kept.add(named(i, event), rng)
            elif kept.can_sample(4):
                drawn += [t.trace_id for t in kept.sample(4, rng)]
        return drawn

    whole, rng = replay(), random.Random(seed)
    expected = play(whole, rng, 0, len(events))
    first, rng = replay(), random.Random(seed)
    drawn = play(first, rng, 0, cut)
    second = replay()
    second.restore(first.state(), {t.trace_id: t for t in first})
    assert drawn + play(second, rng, cut, len(events)) == expected
    assert second.state() == whole.state()
    assert len(list(whole)) <= 8
