"""Checkpoints: what is restored, what is refused, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from livedraft.contracts.messages import Delivery, Trace
from livedraft.contracts.settings import Trainer
from livedraft.trainer.checkpoint import Checkpoints
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import Target, fresh_config

TraceMaker = Callable[..., Trace]
SETTINGS = Trainer(batch_traces=2, unroll=3, replay_traces=6, max_uses=50, precision="float32")


@pytest.fixture
def learner_of(target: Target) -> Callable[[], Learner]:
    identity = TargetId(target="tiny", target_revision="r", tokenizer_hash="h")
    return lambda: Learner(Drafter.fresh(target, fresh_config(target)), identity, SETTINGS)


def teach(learner: Learner, random_trace: TraceMaker, numbers: range, steps: int = 2) -> None:
    for n in numbers:
        learner.admit(Delivery(partition="0", offset=n, item=random_trace(n, tokens=8)))
        if learner.can_learn:
            for _ in range(steps):
                learner.step()


def same(a: Learner, b: Learner) -> bool:
    (plain_a, tensors_a, traces_a), (plain_b, tensors_b, traces_b) = a.state(), b.state()
    assert tensors_a.keys() == tensors_b.keys()
    equal = all(torch.equal(t, tensors_b[n]) for n, t in tensors_a.items())
    return equal and plain_a == plain_b and traces_a == traces_b


def test_a_restored_learner_goes_on_as_the_first(
    learner_of: Callable[[], Learner], random_trace: TraceMaker, tmp_path: Path
) -> None:
    first, second = learner_of(), learner_of()
    teach(first, random_trace, range(9))
    Checkpoints(tmp_path).save(first)
    place = Checkpoints(tmp_path).load(second)
    assert place is not None
    assert same(first, second)
    for learner in (first, second):
        teach(learner, random_trace, range(9, 14))
    assert same(first, second)


def test_nothing_to_load_is_no_error(learner_of: Callable[[], Learner], tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").load(learner_of()) is None


@pytest.mark.parametrize("victim", ["state.msgpack", "tensors.safetensors", "seal.json", "trace"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_passed_over(
    learner_of: Callable[[], Learner], random_trace: TraceMaker, tmp_path: Path, victim: str, damage: str
) -> None:
    learner, checkpoints = learner_of(), Checkpoints(tmp_path)
    teach(learner, random_trace, range(4))
    older = checkpoints.save(learner)
    traces = set((tmp_path / "traces").iterdir())
    teach(learner, random_trace, range(4, 6))
    newer = checkpoints.save(learner)
    path = next(iter(set((tmp_path / "traces").iterdir()) - traces)) if victim == "trace" else newer / victim
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    assert Checkpoints(tmp_path).load(learner_of()) == older


def test_two_are_kept_with_the_traces_they_need_and_no_others(
    learner_of: Callable[[], Learner], random_trace: TraceMaker, tmp_path: Path
) -> None:
    learner, checkpoints = learner_of(), Checkpoints(tmp_path)
    (tmp_path / ".half-dead").mkdir(parents=True)
    held = []
    for n in range(0, 20, 4):
        teach(learner, random_trace, range(n, n + 4))
        held.append({t.trace_id for t in learner.state()[2]})
        checkpoints.save(learner)
    assert len(list(tmp_path.glob("step-*"))) == 2
    assert not list(tmp_path.glob(".half-*"))
    assert len(list((tmp_path / "traces").iterdir())) == len(held[-1] | held[-2])


def test_the_same_step_is_written_once_and_another_process_may_replace_it(
    learner_of: Callable[[], Learner], random_trace: TraceMaker, tmp_path: Path
) -> None:
    learner, checkpoints = learner_of(), Checkpoints(tmp_path)
    teach(learner, random_trace, range(3))
    place = checkpoints.save(learner)
    (place / "state.msgpack").write_bytes(b"torn")
    assert checkpoints.save(learner) == place
    assert Checkpoints(tmp_path).load(learner_of()) is None
    assert Checkpoints(tmp_path).save(learner) == place
    assert Checkpoints(tmp_path).load(learner_of()) == place
