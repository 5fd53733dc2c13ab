"""Which tokens a drafter can propose: counted, exchanged, followed by the trainer, judged fairly."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from livedraft.contracts import checkpoint
from livedraft.contracts.messages import Delivery, Manifest, Trace
from livedraft.contracts.settings import Trainer
from livedraft.swap.memory_registry import MemoryRegistry
from livedraft.traces.arrays import from_numpy, to_numpy
from livedraft.traces.memory import MemoryStream
from livedraft.trainer.checkpoint import Checkpoints
from livedraft.trainer.evaluate import replay
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.loop import run
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import Target, fresh_config
from livedraft.trainer.vocabulary import expected_counts, most_frequent, with_vocabulary
from msgspec.structs import replace

TraceMaker = Callable[..., Trace]
VOCAB, DRAFT = 40, 12
IDENTITY = TargetId(target="tiny", target_revision="r", tokenizer_hash="h")


def pruned(target: Target, kept: list[int], seed: int = 3) -> Drafter:
    return Drafter.fresh(target, fresh_config(target, draft_vocab=len(kept)), seed=seed, kept=torch.tensor(kept))


def learner(drafter: Drafter, **changes: object) -> Learner:
    options: dict[str, object] = {"batch_traces": 2, "unroll": 3, "replay_traces": 8, "precision": "float32"}
    return Learner(drafter, IDENTITY, Trainer(**(options | changes)), layers=(1, 3, 4))  # type: ignore[arg-type]


def test_counts_are_what_the_target_expected_of_each_output_token(trace_of: TraceMaker) -> None:
    # Output 5 9 7: no row was recorded before the first, one accepted and one rejected proposal before the others.
    trace = trace_of([1, 2], [([9, 8], [-1, 0], [True, False], 7)])
    ids, p = to_numpy(trace.rounds.top_ids), np.exp(to_numpy(trace.rounds.top_logprobs))
    wanted = np.zeros(VOCAB)
    wanted[5] += 1
    for row, token in ((0, 9), (1, 7)):
        wanted[ids[row]] += p[row]
        wanted[token] += token not in ids[row]
    np.testing.assert_allclose(expected_counts(trace, VOCAB), wanted)


def test_on_average_they_are_the_counts_of_tokens(trace_of: TraceMaker) -> None:
    p = np.exp(np.random.default_rng(2).normal(0, 2, VOCAB))
    p = np.sort(p / p.sum())[::-1]
    mean = np.zeros(VOCAB)
    for token in range(VOCAB):
        trace = trace_of([1], [([], [], [], token)], first=0)
        rounds = replace(
            trace.rounds, top_ids=from_numpy([[0, 1, 2, 3]], "i4"), top_logprobs=from_numpy(np.log(p[None, :4]), "f4")
        )
        mean += p[token] * expected_counts(replace(trace, rounds=rounds), VOCAB)
    mean[0] -= 1  # the first output token, of which no row tells
    np.testing.assert_allclose(mean, p, rtol=1e-5)


@given(
    st.lists(st.floats(0, 100), min_size=VOCAB, max_size=VOCAB),
    st.permutations(range(VOCAB)).map(lambda ids: ids[:DRAFT]),
)
def test_the_most_frequent_are_kept_and_of_equals_those_that_were(counts: list[float], before: list[int]) -> None:
    kept = most_frequent(np.array(counts), DRAFT, always=[7, VOCAB + 1], before=np.array(before)).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == DRAFT
    assert 7 in kept

    def order(token: int) -> tuple[float, bool, int]:
        return -counts[token], token not in before, token

    others = sorted((token for token in range(VOCAB) if token != 7), key=order)
    assert set(kept) - {7} == set(others[: DRAFT - 1])


def test_rows_of_tokens_that_stay_are_carried_over_and_new_ones_are_the_targets(target: Target, tmp_path: Path) -> None:
    old = pruned(target, [*range(0, 24, 2)])
    with torch.no_grad():
        old.lm_head.weight.add_(1.0)
    kept = np.array([0, 1, 2, 3, 8, 9, 20, 22, 30, 31, 38, 39])
    found = with_vocabulary(old.to_arrays(), kept, target.head.numpy())
    manifest = Manifest(tensors={}, target="t", target_revision="r", tokenizer_hash="h", vocabulary="refreshed")
    checkpoint.write(tmp_path / "d", old.config, found, manifest)
    assert checkpoint.verify(tmp_path / "d", like=old.config)[1].vocabulary == "refreshed"
    new = Drafter.from_checkpoint(tmp_path / "d", target.embedding)
    assert new.draft_ids.tolist() == kept.tolist()
    for row, token in enumerate(kept.tolist()):
        wanted = old.lm_head.weight[token // 2] if token in range(0, 24, 2) else target.head[token]
        assert torch.equal(new.lm_head.weight[row], wanted)
    for name, tensor in old.state_dict().items():
        assert name in ("lm_head.weight", "d2t", "t2d") or torch.equal(new.state_dict()[name], tensor)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_cannot_be_proposed_is_a_rejection_to_the_gate(
    target: Target, random_trace: TraceMaker, temperature: float
) -> None:
    trace = random_trace(1, temperature=temperature, finish_reason="stop")
    said = set(to_numpy(trace.output)[1:].tolist())
    unsaid = [token for token in range(VOCAB) if token not in said][:DRAFT]
    (none,) = replay(pruned(target, unsaid), [trace], 3)
    assert none.rounds == none.tokens
    (some,) = replay(pruned(target, sorted(said)), [trace], 3)
    assert some.rounds < some.tokens or temperature == 0  # it may well guess nothing right


def test_a_share_that_stays_above_the_limit_is_told_once(
    target: Target, random_trace: TraceMaker, caplog: pytest.LogCaptureFixture
) -> None:
    found = learner(pruned(target, [*range(DRAFT)]), excluded_limit=0.01, excluded_steps=5, max_uses=100)
    for n in range(6):
        found.admit(Delivery(partition="0", offset=n, item=random_trace(n)))
    for _ in range(12):
        found.step()
    assert 0.01 < found.excluded < 1
    assert sum("refresh-vocabulary" in record.message for record in caplog.records) == 1
    plain, tensors, traces = found.state()
    again = learner(pruned(target, [*range(DRAFT)]), excluded_limit=0.01, excluded_steps=5, max_uses=100)
    again.restore(plain, tensors, {trace.trace_id: trace for trace in traces})
    assert again.excluded == found.excluded
    again.step()
    assert sum("refresh-vocabulary" in record.message for record in caplog.records) == 1


def test_a_drafter_that_can_propose_all_excludes_nothing(
    drafter: Drafter, random_trace: TraceMaker, caplog: pytest.LogCaptureFixture
) -> None:
    found = learner(drafter, excluded_steps=1)
    for n in range(3):
        found.admit(Delivery(partition="0", offset=n, item=random_trace(n)))
    found.step()
    assert found.excluded == pytest.approx(0, abs=1e-6)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_new_lineage_starts_from_its_own_weights_with_what_was_read(
    target: Target, random_trace: TraceMaker, tmp_path: Path
) -> None:
    first = learner(pruned(target, [*range(DRAFT)]))
    for n in range(5):
        first.admit(Delivery(partition="0", offset=n, item=random_trace(n)))
    first.step()
    Checkpoints(tmp_path).save(first)
    fresh = pruned(target, [*range(5, 5 + DRAFT)], seed=9)
    wanted = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    second = learner(fresh)
    Checkpoints(tmp_path).load(second)
    assert (second.offsets, second.counts, second.steps) == (first.offsets, first.counts, first.steps)
    assert second.state()[2] == first.state()[2]
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in second.drafter.state_dict().items())
    assert all((second.candidate()[name] == tensor.numpy()).all() for name, tensor in wanted.items())
    second.step()
    Checkpoints(tmp_path).save(second)
    third = learner(pruned(target, [*range(5, 5 + DRAFT)]))
    Checkpoints(tmp_path).load(third)
    assert all((third.candidate()[name] == array).all() for name, array in second.candidate().items())


def test_the_trainer_ends_once_another_lineage_is_live_and_publishes_no_more_of_its_own(
    target: Target, random_trace: TraceMaker, tmp_path: Path
) -> None:
    registry = MemoryRegistry(tmp_path / "registry")
    stream = MemoryStream()
    for n in range(6):
        stream.offer(random_trace(n, tokens=8))
    settings = Trainer(folder=str(tmp_path / "trainer"), batch_traces=2, unroll=3, nice=0, publish_every_s=0.0)
    found = Learner(pruned(target, [*range(DRAFT)]), IDENTITY, settings, layers=(1, 3, 4))

    def publish(drafter: Drafter, name: str) -> str:
        manifest = Manifest(tensors={}, target="tiny", target_revision="r", tokenizer_hash="h")
        manifest = checkpoint.write(tmp_path / name, drafter.config, drafter.to_arrays(), manifest)
        return registry.publish(tmp_path / name, manifest, {}).version

    registry.point("live", publish(pruned(target, [*range(DRAFT)]), "old"))
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(found, stream.source("trainer"), registry, settings, stop))
    thread.start()
    try:
        thread.join(0.5)
        assert thread.is_alive()
        registry.point("live", publish(pruned(target, [*range(1, 1 + DRAFT)]), "new"))
        thread.join(60)
        assert not thread.is_alive()
    finally:
        stop.set()
        thread.join()
    lineages = [version.tags["lineage"] for version in registry.versions()]
    assert lineages[0] != lineages[-1]  # the newest is the one that was made live
    assert Checkpoints(tmp_path / "trainer" / "checkpoints").load(found) is not None
