"""Admission, lockstep and staleness."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
from livedraft.contracts.messages import DeadLetter, Delivery, Features, Trace
from livedraft.contracts.settings import Trainer
from livedraft.traces.arrays import from_numpy
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.model import Drafter
from msgspec.structs import replace

TraceMaker = Callable[..., Trace]
TARGET = TargetId(target="tiny", target_revision="r", tokenizer_hash="h")


def learner(drafter: Drafter, held_out: float = 0.0, **changes: object) -> Learner:
    options: dict[str, object] = {"batch_traces": 2, "unroll": 3, "replay_traces": 8, "precision": "float32"}
    return Learner(drafter, TARGET, Trainer(**(options | changes)), held_out=held_out, layers=(1, 3, 4))  # type: ignore[arg-type]


def deliver(to: Learner, *items: Trace | DeadLetter) -> list[str]:
    first = to.offsets.get("0", 0)
    return [to.admit(Delivery(partition="0", offset=first + i, item=item)) for i, item in enumerate(items)]


def test_each_delivery_is_judged_counted_and_passed(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter)
    other_layers = msgspec.structs.replace(random_trace(6).features, layers=(1, 2, 3))
    verdicts = deliver(
        found,
        random_trace(1),
        random_trace(1),
        random_trace(2, target_revision="other"),
        random_trace(3, features=Features(mode="recompute")),
        random_trace(4, consent=False),
        DeadLetter(offset=5, reason="torn"),
        random_trace(6, features=other_layers),
        msgspec.structs.replace(random_trace(7), prompt=from_numpy([40], "i4")),
    )
    assert verdicts == [
        "admitted",
        "duplicate",
        "other target",
        "no features",
        "no consent",
        "dead letter",
        "other features",
        "unknown token",
    ]
    assert found.counts == dict.fromkeys(verdicts, 1)
    assert found.offsets == {"0": 8}


def test_held_out_requests_are_never_learned(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, held_out=1.0)
    assert set(deliver(found, *(random_trace(n) for n in range(5)))) == {"held out"}
    assert not found.can_learn


def test_it_sleeps_when_everything_is_used_up(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, max_uses=3)
    deliver(found, *(random_trace(n) for n in range(4)))
    while found.can_learn:
        found.step()
    assert 4 <= found.steps <= 4 * 3 // 2  # until fewer are left than fill a batch
    deliver(found, random_trace(7), random_trace(8))
    assert found.can_learn


def test_at_rest_it_learns_from_each_new_trace_once(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, max_uses=9)
    deliver(found, *(random_trace(n) for n in range(4)))
    found.step()
    found.pace = replace(found.pace, mode="resting")
    found.step()
    assert not found.can_learn  # all four were seen once
    deliver(found, random_trace(7))
    assert not found.can_learn
    deliver(found, random_trace(8))
    assert found.can_learn
    found.step()
    assert not found.can_learn
    found.pace = replace(found.pace, mode="steady")
    assert found.can_learn


def test_a_drift_turns_replay_over(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, replay_traces=40, learning_rate=0.0, matrix_learning_rate=0.0, warmup_steps=1)
    deliver(found, *(random_trace(n, domain="old") for n in range(12)))
    for _ in range(6):
        found.step()
    assert found.pace.tests.keys() == {"", "old"}
    # It expected far more of the traffic than the next traces show.
    expects = {name: replace(test, peak=test.sum + 100.0) for name, test in found.pace.tests.items()}
    found.pace = replace(found.pace, tests=expects)
    deliver(found, *(random_trace(n, domain="new") for n in range(20, 24)))
    found.step()
    assert (found.pace.mode, found.pace.drifts) == ("recovering", 1)
    plain, _, _ = found.state()
    used = [name for name, uses in plain.replay.recent if uses]
    assert len(used) == found._settings.batch_traces
    assert len(plain.replay.memory["old"]) == 8 - len(used)  # six steps of one new trace, after one of two


def test_in_lockstep_steps_follow_records(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, steps_per_trace=0.5)
    steps = []
    for n in range(8):
        assert found.appetite == 1
        deliver(found, random_trace(n))
        while found.can_learn:
            assert found.appetite == 0
            found.step()
        steps.append(found.steps)
    assert steps == [0, 1, 1, 2, 2, 3, 3, 4]


def test_long_traces_show_different_windows(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, window=12, max_uses=20, batch_traces=1)
    deliver(found, random_trace(1, tokens=60))
    counts = {found.step().tokens for _ in range(10)}
    assert max(counts) <= 12
    assert min(counts) > 0


def test_rejections_of_old_drafters_are_dropped(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, discard=0.1, max_version_lag=2)
    deliver(found, *(random_trace(n, drafters=(str(n),)) for n in range(5)))
    assert found._stale == {"0", "1", "2"}


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_step_moves_every_tensor_that_can_learn(drafter: Drafter, random_trace: TraceMaker, head: str) -> None:
    found = learner(drafter, head=head)
    deliver(found, random_trace(1), random_trace(2))
    before = {name: p.detach().clone() for name, p in drafter.named_parameters()}
    step = found.step()
    assert step.tokens > 0
    assert step.accept_length >= 1
    for name, parameter in drafter.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved == (head == "trained" or name != "lm_head.weight"), name


def test_what_is_published_is_the_mean_of_the_path(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, average=0.25)
    deliver(found, random_trace(1), random_trace(2), random_trace(3))
    mean = {name: p.detach().clone() for name, p in drafter.named_parameters()}
    for step in range(4):
        found.step()
        kept = min(0.25, (1 + step) / (10 + step))
        mean = {name: kept * mean[name] + (1 - kept) * p.detach() for name, p in drafter.named_parameters()}
    candidate = found.candidate()
    assert set(candidate) == set(drafter.to_arrays())
    for name, expected in mean.items():
        np.testing.assert_allclose(candidate[name], expected.numpy(), rtol=1e-5, atol=1e-7)
    assert not np.allclose(candidate["fc.weight"], drafter.fc.weight.detach().numpy(), rtol=1e-6, atol=0)


def test_after_a_drift_the_mean_begins_anew(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, average=0.98, replay_traces=40)
    deliver(found, *(random_trace(n) for n in range(12)))
    for _ in range(6):
        found.step()
    expects = {name: replace(test, peak=test.sum + 100.0) for name, test in found.pace.tests.items()}
    found.pace = replace(found.pace, tests=expects)
    deliver(found, *(random_trace(n) for n in range(20, 24)))
    found.step()
    assert (found.pace.drifts, found.pace.since) == (1, 0)
    before = found.candidate()["fc.weight"]
    found.step()
    expected = 0.1 * before + 0.9 * drafter.fc.weight.detach().numpy()
    np.testing.assert_allclose(found.candidate()["fc.weight"], expected, rtol=1e-5, atol=1e-7)


def test_without_a_memory_the_last_step_is_published(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, average=0.0)
    deliver(found, random_trace(1), random_trace(2))
    found.step()
    candidate, held = found.candidate(), drafter.to_arrays()
    assert all((candidate[name] == held[name]).all() for name in held)


def test_a_restart_goes_on_averaging_where_it_was(drafter: Drafter, random_trace: TraceMaker) -> None:
    traces = [random_trace(n) for n in range(3)]
    found = learner(drafter)
    deliver(found, *traces)
    found.step()
    found.step()
    plain, tensors, kept = found.state()
    again = learner(Drafter(drafter.config, drafter.embedding))
    again.restore(plain, {name: t.clone() for name, t in tensors.items()}, {t.trace_id: t for t in kept})
    assert all((again.candidate()[name] == array).all() for name, array in found.candidate().items())
    found.step()
    again.step()
    assert all((again.candidate()[name] == array).all() for name, array in found.candidate().items())


def test_a_step_that_overflows_changes_nothing(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter)
    features = random_trace(1).features
    assert features.values is not None
    huge = msgspec.structs.replace(features, values=from_numpy(np.full(features.values.shape, 3e38), "f4"))
    deliver(found, random_trace(1, features=huge), random_trace(2))
    with torch.no_grad():
        drafter.fc.weight.fill_(100)
    before = drafter.lm_head.weight.detach().clone()
    found.step()
    assert torch.equal(before, drafter.lm_head.weight)
    assert found.counts["overflown step"] == 1


def test_a_window_without_a_recorded_row_teaches_nothing_and_breaks_nothing(
    drafter: Drafter, random_trace: TraceMaker
) -> None:
    found = learner(drafter, batch_traces=1)
    trace = random_trace(1)
    last = from_numpy([trace.prompt.shape[0] + trace.output.shape[0] - 1], "i4")
    one = msgspec.structs.replace(
        random_trace(1, tokens=0).rounds,
        root=last,
        size=from_numpy([0], "i4"),
        drafter=from_numpy([0], "i2"),
        bonus=from_numpy([1], "i4"),
        top_ids=from_numpy([[1, 2, 3, 4]], "i4"),
        top_logprobs=from_numpy([[-0.1, -9.0, -9.0, -9.0]], "f4"),
        tail=from_numpy([0.0], "f4"),
    )
    deliver(found, msgspec.structs.replace(trace, rounds=one))
    assert found.step().accept_length >= 1


def test_the_unroll_deepens_as_chains_grow(drafter: Drafter, random_trace: TraceMaker) -> None:
    found = learner(drafter, unroll=4, max_uses=500, batch_traces=1, learning_rate=1e-2)
    deliver(found, random_trace(1))
    depths = [found.depth]
    while depths[-1] < 4 and found.steps < 400:
        found.step()
        depths.append(found.depth)
    assert depths[0] == 2
    assert depths[-1] == 4
