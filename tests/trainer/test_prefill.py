"""What an engine left out is what the frozen target says of the same text: the same features, word and lessons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from livedraft.contracts import checkpoint
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import Delivery, Features, Generation, Manifest, Rounds, Sampling, Trace
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.contracts.settings import Trainer
from livedraft.serving.local.capture import FeatureMode
from livedraft.serving.local.engine import LocalEngine
from livedraft.traces.arrays import feature_values, from_numpy, to_float32, to_numpy
from livedraft.traces.validation import validate
from livedraft.trainer.checkpoint import Checkpoints
from livedraft.trainer.evaluate import DraftReplay
from livedraft.trainer.learner import Learner, TargetId
from livedraft.trainer.lesson import lay_open, row_after
from livedraft.trainer.model import Drafter
from livedraft.trainer.prefill import Prefill, is_whole
from livedraft.trainer.target import fresh_config, read_target
from msgspec.structs import replace

from tests.serving.local.client import Client
from tests.serving.local.models import make_drafter, make_target

FAMILIES = ["llama", "qwen2", "qwen3"]
HIDDEN = 32


class Kept:
    """A sink that keeps what it is offered."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self.dropped = 0

    def offer(self, trace: Trace) -> bool:
        self.traces.append(trace)
        return True

    def close(self, timeout: float = 5.0) -> None:
        pass


def serve(folder: Path, features: FeatureMode, count: int = 6, **settings: object) -> list[Trace]:
    """Traces of requests of different lengths and temperatures, in the order of their ids."""
    sink = Kept()
    drafter = folder.parent / "drafter"
    if not drafter.exists():
        make_drafter(drafter, folder)
    chosen = EngineSettings(target=str(folder), adaptive_depth=False, **settings)  # type: ignore[arg-type]
    engine = LocalEngine(chosen, drafter=drafter, sink=sink, features=features)
    rng = np.random.default_rng(5)
    Client(engine).run(
        [
            Generation(
                request_id=str(i),
                prompt=tuple(rng.integers(3, 64, int(rng.integers(1, 40))).tolist()),
                sampling=Sampling(temperature=0.7 * (i % 2), seed=i),
                max_tokens=int(rng.integers(12, 50)),
                ignore_eos=True,
            )
            for i in range(count)
        ]
    )
    engine.close()
    return sorted(sink.traces, key=lambda trace: int(trace.request_id))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("llama") / "target", "llama", layers=8)


@pytest.fixture(scope="module")
def inline(folder: Path) -> list[Trace]:
    return serve(folder, "bf16")


def stripped(trace: Trace) -> Trace:
    return replace(trace, features=Features(mode="recompute", layers=trace.features.layers))


def text_only(trace: Trace) -> Trace:
    """As a stock engine would leave it."""
    rounds = {name: getattr(trace.rounds, name) for name in Rounds.__struct_fields__}
    empty = {name: from_numpy(to_numpy(array)[:0], array.dtype) for name, array in rounds.items()}
    return replace(trace, features=Features(mode="recompute"), rounds=Rounds(**empty), drafters=())


def assert_same_features(found: Trace, wanted: Trace) -> None:
    assert found.features.values is not None
    assert wanted.features.values is not None
    assert found.features.layers == wanted.features.layers
    assert found.features.values.dtype == "bf2"
    ours, theirs = to_float32(found.features.values), to_float32(wanted.features.values)
    # Two steps of bfloat16, which has 8 bits: the engine folds gains into weights, and sums in another order.
    np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=2**-10 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [1, 3], ids=["chain", "tree"])
def test_features_are_those_that_the_engine_would_have_sent(tmp_path: Path, family: str, tree: int) -> None:
    target = make_target(tmp_path / "target", family, layers=8)
    wanted = serve(target, "bf16", tree_topk=tree)
    sent = serve(target, "recompute", tree_topk=tree)
    prefill = Prefill(target)
    assert all(trace.features.values is None and trace.features.layers == (1, 3, 4) for trace in sent)
    assert all(prefill.can_fill(trace) for trace in sent)
    for found, left_out, whole in zip(prefill.fill(sent), sent, wanted, strict=True):
        validate(found)
        assert is_whole(found, 3 * HIDDEN)
        assert (found.rounds, found.prompt, found.output) == (left_out.rounds, whole.prompt, whole.output)
        assert_same_features(found, whole)


@pytest.mark.parametrize("tokens", [1, 7, 64, 100_000])
def test_pieces_and_company_change_nothing(folder: Path, inline: list[Trace], tokens: int) -> None:
    prefill = Prefill(folder, tokens=tokens)
    assert all(map(prefill.can_fill, map(stripped, inline)))
    for found, wanted in zip(prefill.fill([stripped(trace) for trace in inline]), inline, strict=True):
        assert found.trace_id == wanted.trace_id
        assert_same_features(found, wanted)


def test_of_a_stock_engine_the_text_is_enough(folder: Path, inline: list[Trace]) -> None:
    prefill = Prefill(folder, topk=32)
    bare = [text_only(trace) for trace in inline]
    assert all(map(prefill.can_fill, bare))
    for found, wanted in zip(prefill.fill(bare), inline, strict=True):
        validate(found)
        assert_same_features(found, wanted)
        prompt, length = wanted.prompt.shape[0], wanted.prompt.shape[0] + wanted.output.shape[0]
        ours, theirs = (row_after(t, lay_open(t.rounds), length)[prompt - 1 : -1] for t in (found, wanted))
        assert (ours >= 0).all()
        assert (theirs >= 0).all()
        for name in ("top_logprobs", "tail"):
            mine, engines = (to_numpy(getattr(t.rounds, name)) for t in (found, wanted))
            np.testing.assert_allclose(mine[ours], engines[theirs], atol=2e-3)
        assert (to_numpy(found.rounds.top_ids)[ours, 0] == to_numpy(wanted.rounds.top_ids)[theirs, 0]).mean() > 0.99
        assert to_numpy(found.rounds.bonus).tolist() == to_numpy(found.output).tolist()


def learner(folder: Path, scope: str = "absent", **changes: object) -> Learner:
    target = read_target(folder)
    options: dict[str, object] = {"batch_traces": 3, "unroll": 3, "precision": "float32", "replay_traces": 16}
    settings = Trainer(**(options | changes), recompute=scope)  # type: ignore[arg-type]
    found = Prefill(folder, scope=settings.recompute, tokens=settings.recompute_tokens)
    identity = TargetId(target=str(folder), target_revision="", tokenizer_hash="")
    drafter = Drafter.fresh(target, fresh_config(target), seed=1)
    return Learner(drafter, identity, settings, layers=target.feature_layers, prefill=found)


def admit(to: Learner, *traces: Trace) -> list[str]:
    named = [replace(t, target=to.target.target, target_revision="", tokenizer_hash="") for t in traces]
    first = to.offsets.get("0", 0)
    return [to.admit(Delivery(partition="0", offset=first + i, item=t)) for i, t in enumerate(named)]


def test_features_of_8_bits_are_near_and_teach_nearly_the_same(folder: Path, inline: list[Trace]) -> None:
    narrow = serve(folder, "fp8")
    for found, wanted in zip(narrow, inline, strict=True):
        validate(found)
        assert (found.output, found.rounds) == (wanted.output, wanted.rounds)
        ours, theirs = feature_values(found.features), feature_values(wanted.features)
        steps = np.abs(theirs).max(1, keepdims=True) / 448 * 2**-9
        assert (np.abs(ours - theirs) <= np.maximum(np.abs(theirs) / 15, steps)).all()
    losses = []
    for traces in (inline, narrow):
        found_by = learner(folder)
        assert admit(found_by, *traces) == ["admitted"] * len(traces)
        losses.append([found_by.step().loss for _ in range(12)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)


@pytest.mark.parametrize("lose", [stripped, text_only], ids=["without features", "text alone"])
def test_it_learns_the_same(folder: Path, inline: list[Trace], lose: Callable[[Trace], Trace]) -> None:
    """Bound: features are within two steps of bfloat16, and the loss follows them smoothly.  Text has no rejections."""
    losses = []
    for traces in (inline, [lose(trace) for trace in inline]):
        found = learner(folder, discard=0.0)
        assert admit(found, *traces) == ["admitted"] * len(traces)
        losses.append([found.step().loss for _ in range(12)])
    assert losses[0][-1] < 0.8 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
    assert losses[1] != losses[0]


def test_only_what_is_drawn_is_prefilled_and_once(folder: Path, inline: list[Trace]) -> None:
    found = learner(folder, batch_traces=2, fresh_share=1.0)
    admit(found, *(stripped(trace) for trace in inline))

    def held() -> dict[str, Trace]:
        return {t.trace_id: t for t in found.state()[2] if t.features.values is not None}

    assert held() == {}
    found.step()
    first = held()
    assert len(first) == 2
    while found.can_learn and found.steps < 20:
        found.step()
    assert held().keys() == {trace.trace_id for trace in inline}
    assert all(held()[name] is trace for name, trace in first.items())


def test_a_restart_learns_from_the_bytes_it_had(folder: Path, inline: list[Trace], tmp_path: Path) -> None:
    """Prefilling again in other company could round otherwise, so a checkpoint holds what was prefilled since."""
    first, second = learner(folder), learner(folder)
    admit(first, *(stripped(trace) for trace in inline))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(first)
    first.step()
    checkpoints.save(first)
    assert Checkpoints(tmp_path).load(second) is not None
    assert second.state()[2] == first.state()[2]
    for _ in range(3):
        assert first.step() == second.step()


def test_what_may_not_be_prefilled_any_more_leaves_replay(folder: Path, inline: list[Trace], tmp_path: Path) -> None:
    first, second = learner(folder), learner(folder, scope="never")
    admit(first, *(stripped(trace) for trace in inline[:3]), *inline[3:])
    Checkpoints(tmp_path).save(first)
    Checkpoints(tmp_path).load(second)
    assert {trace.trace_id for trace in second.state()[2]} == {trace.trace_id for trace in inline[3:]}
    second.step()


def test_a_cached_prefix_is_made_good_where_that_is_asked_for(folder: Path, inline: list[Trace]) -> None:
    trace = next(t for t in inline if t.prompt.shape[0] > 8)
    assert trace.features.values is not None
    kept = from_numpy(to_numpy(trace.features.values)[5:], "bf2")
    partial = replace(trace, features=replace(trace.features, start=5, values=kept))
    assert admit(learner(folder), partial) == ["no features"]
    assert admit(learner(folder, scope="partial"), partial) == ["admitted"]
    prefill = Prefill(folder, scope="partial")
    assert prefill.can_fill(partial)
    assert_same_features(prefill.fill([partial])[0], trace)


def test_each_trace_that_cannot_be_completed_is_counted(folder: Path, inline: list[Trace]) -> None:
    bare = stripped(inline[0])
    wrong = {
        "no features": [bare],
        "other features": [replace(bare, trace_id="a", features=Features(mode="recompute", layers=(1, 2, 3)))],
        "unknown token": [replace(bare, trace_id="b", prompt=from_numpy([64], "i4"))],
        "nothing to learn": [
            replace(bare, trace_id="c", prompt=from_numpy(np.zeros(0, int), "i4")),
            replace(bare, trace_id="d", output=from_numpy([1], "i4")),
        ],
    }
    found = learner(folder, scope="never")
    for verdict, traces in wrong.items():
        assert set(admit(found, *traces)) == {verdict}
    prefill = Prefill(folder)
    assert [prefill.can_fill(trace) for traces in wrong.values() for trace in traces] == [True, *[False] * 4]


def damaged(folder: Path, into: Path, how: str) -> Path:
    from safetensors.torch import load_file, save_file

    into.mkdir()
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if how == "missing tensor":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    if how == "unknown family":
        config["model_type"] = "abacus"
    if how == "other head":
        config |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 4.0}
    (into / "config.json").write_text(json.dumps(config))
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.mark.parametrize("how", ["missing tensor", "unknown family", "other head"])
def test_a_target_that_cannot_be_run_costs_only_those_traces(
    folder: Path, inline: list[Trace], tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers would draw a missing tensor by chance, and a scaled head would teach another distribution."""
    found = learner(damaged(folder, tmp_path / "target", how))
    assert admit(found, stripped(inline[0]), stripped(inline[1]), *inline[2:]) == ["no features"] * 2 + ["admitted"] * 4
    found.step()
    assert [record.message for record in caplog.records if "teach nothing" in record.message] != []
    assert sum("teach nothing" in record.message for record in caplog.records) == 1


def test_the_gate_scores_them_alike(folder: Path, inline: list[Trace], tmp_path: Path) -> None:
    target = read_target(folder)
    drafter = Drafter.fresh(target, fresh_config(target), seed=1)
    manifest = Manifest(tensors={}, target="t", target_revision="r", tokenizer_hash="h")
    checkpoint.write(tmp_path / "d", drafter.config, drafter.to_arrays(), manifest)
    bare = [lose(t) for t, lose in zip(inline, [stripped, text_only] * 3, strict=True)]
    scorer = DraftReplay(folder, 3, prefill=Prefill(folder))
    wanted = scorer.score(tmp_path / "d", inline)
    assert len(wanted) == len(inline)
    for _ in range(2):
        for found, score in zip(scorer.score(tmp_path / "d", bare), wanted, strict=True):
            assert found.trace_id == score.trace_id
            assert found.tokens == pytest.approx(score.tokens, rel=0.02)
            assert found.rounds == pytest.approx(score.rounds, rel=0.02)
    assert DraftReplay(folder, 3).score(tmp_path / "d", bare) == []


def test_a_folder_that_is_no_target_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config\.json"):
        Prefill(tmp_path)


def test_low_precision_is_near(folder: Path, inline: list[Trace]) -> None:
    prefill = Prefill(folder, low_precision=True)
    assert prefill.can_fill(stripped(inline[0]))
    found = prefill.fill([stripped(inline[0])])[0].features.values
    wanted = inline[0].features.values
    assert found is not None
    assert wanted is not None
    ours, theirs = torch.tensor(to_float32(found)), torch.tensor(to_float32(wanted))
    assert float(torch.nn.functional.cosine_similarity(ours, theirs).min()) > 0.99
