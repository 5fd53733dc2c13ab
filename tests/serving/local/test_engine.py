"""The engine answers as the target would, whatever is drafted, swapped, cancelled or joined meanwhile."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from livedraft.contracts.errors import BadRequest, DrafterRejected, Overloaded, PromptTooLong, SwapFailed
from livedraft.contracts.messages import Delta, Generation, Sampling, SwapRequest, Trace
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.kernels.sampling import distribution
from livedraft.serving.local.engine import LocalEngine
from livedraft.traces.validation import validate
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tests.serving.local.client import Client
from tests.serving.local.models import BUNDLED, make_drafter, make_target

PROMPTS = [[5, 9, 3, 60, 12], [7, 8], [21, 40, 11, 5, 5, 9, 30], [33, 44, 55], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
MODES = {
    "none": {"draft_depth": 0},
    "chain": {"draft_depth": 4, "adaptive_depth": False},
    "tree": {"draft_depth": 3, "tree_topk": 3, "tree_nodes": 8, "adaptive_depth": False},
    "adaptive": {"draft_depth": 4, "adaptive_depth": True},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"), "llama")


@pytest.fixture(scope="module")
def drafter(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafters") / "a"
    make_drafter(folder, target, draft_vocab=48)
    return folder


def start(target: Path, drafter: Path | None, mode: str = "chain", **more: object) -> LocalEngine:
    settings = EngineSettings(target=str(target), **{**MODES[mode], **more})  # type: ignore[arg-type]
    return LocalEngine(settings, drafter=drafter)


@pytest.fixture
def engine(target: Path, drafter: Path) -> Iterator[LocalEngine]:
    engine = start(target, drafter)
    yield engine
    engine.close()


def greedy(prompts: list[list[int]], length: int = 40) -> list[Generation]:
    return [
        Generation(
            request_id=str(i), prompt=tuple(p), sampling=Sampling(temperature=0), max_tokens=length, ignore_eos=True
        )
        for i, p in enumerate(prompts)
    ]


def expected(target: Path, prompts: list[list[int]], length: int = 40) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_greedy_output_is_that_of_transformers_generate(
    target: Path, drafter: Path, mode: str, concurrency: int
) -> None:
    engine = start(target, None if mode == "none" else drafter, mode)
    assert Client(engine).run(greedy(PROMPTS * 2), concurrency) == expected(target, PROMPTS) * 2
    engine.close()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_too(tmp_path: Path, family: str) -> None:
    target = make_target(tmp_path / "target", family)
    make_drafter(tmp_path / "drafter", target)
    engine = start(target, tmp_path / "drafter")
    assert Client(engine).run(greedy(PROMPTS)) == expected(target, PROMPTS)
    engine.close()


@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_swaps_in_mid_request_change_nothing_but_the_version(
    target: Path, drafter: Path, tmp_path: Path, mode: str
) -> None:
    checksums = {str(n): make_drafter(tmp_path / str(n), target, seed=n, draft_vocab=48) for n in range(1, 7)}
    engine = start(target, drafter, mode)
    client = Client(engine)
    for request in greedy(PROMPTS, 200):
        client.submit(request)
    for version, checksum in checksums.items():
        receipt = engine.swap(SwapRequest(path=str(tmp_path / version), version=version, checksum=checksum))
        assert (receipt.version, receipt.checksum) == (version, checksum)
        assert engine.status().drafter_checksum == checksum
    for _ in PROMPTS:
        client.ended.get(timeout=60)
    assert [client.tokens(str(i)) for i in range(len(PROMPTS))] == expected(target, PROMPTS, 200)
    versions = {d.drafter for i in range(len(PROMPTS)) for d in client.deltas[str(i)]}
    assert "6" in versions
    engine.close()


@pytest.mark.parametrize(
    ("mode", "sampling"),
    [("chain", Sampling(temperature=1.0)), ("tree", Sampling(temperature=0.7, top_p=0.9, top_k=20))],
)
def test_sampled_output_follows_the_target(target: Path, drafter: Path, mode: str, sampling: Sampling) -> None:
    """20 000 draws of the two tokens that verify rounds commit, against their exact distribution."""
    prompt = (5, 9, 3, 60, 12)
    engine = start(target, drafter, mode, max_running=16, max_waiting=64)
    requests = [
        Generation(
            request_id=str(i),
            prompt=prompt,
            sampling=msgspec.structs.replace(sampling, seed=i),
            max_tokens=3,
            ignore_eos=True,
        )
        for i in range(20_000)
    ]
    # The first token comes from the prefill.
    pairs = Counter((t[1], t[2]) for t in Client(engine).run(requests, 16))
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    vocabulary = range(model.config.vocab_size)
    contexts = torch.tensor([[*prompt, a, b] for a in vocabulary for b in vocabulary])
    with torch.inference_mode():
        logits = model(contexts).logits[:, len(prompt) - 1 :]
    p = distribution(logits.flatten(0, 1), sampling.temperature, sampling.top_k, sampling.top_p)
    size = len(vocabulary)
    p = p.view(size, size, 3, size)
    first, second, third = p[0, 0, 0], p[:, 0, 1], p[:, :, 2]
    exact = torch.einsum("a,ab,abc->bc", first, second, third).double().numpy()
    for expected_counts, counts in (
        (exact.sum(1), Counter(b for b, _ in pairs.elements())),
        (exact.flatten(), Counter(b * size + c for b, c in pairs.elements())),
    ):
        wanted = expected_counts / expected_counts.sum() * 20_000
        likely = wanted >= 5
        observed = np.array([counts[i] for i in range(len(wanted))])
        table = np.append(observed[likely], observed[~likely].sum()), np.append(wanted[likely], wanted[~likely].sum())
        kept = table[1] > 0
        assert observed[wanted == 0].sum() == 0
        assert chisquare(table[0][kept], table[1][kept]).pvalue > 1e-4


def test_a_seed_repeats_a_sampled_output(engine: LocalEngine) -> None:
    requests = [
        Generation(request_id=str(i), prompt=(5, 9, 3), sampling=Sampling(seed=7), max_tokens=20) for i in range(3)
    ]
    outputs = Client(engine).run(requests, 1)
    assert outputs[0] == outputs[1] == outputs[2]


def test_requests_join_and_leave_at_any_step(target: Path, drafter: Path) -> None:
    engine = start(target, drafter, max_running=3)
    lengths = [3, 30, 11, 1, 25, 7, 18, 2, 40, 5]
    requests = [greedy([PROMPTS[i % 5]], n)[0] for i, n in enumerate(lengths)]
    requests = [
        Generation(request_id=str(i), prompt=r.prompt, sampling=r.sampling, max_tokens=r.max_tokens, ignore_eos=True)
        for i, r in enumerate(requests)
    ]
    whole = expected(target, PROMPTS)
    assert Client(engine).run(requests, 10) == [whole[i % 5][:n] for i, n in enumerate(lengths)]
    engine.close()


def test_a_long_prompt_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("livedraft.serving.local.engine._PREFILL_ROWS", 16)
    target = make_target(tmp_path / "t", "qwen3")
    make_drafter(tmp_path / "d", target)
    prompt = [(7 * i) % 60 + 3 for i in range(150)]
    engine = start(target, tmp_path / "d")
    assert Client(engine).run(greedy([prompt], 20)) == expected(target, [prompt], 20)
    engine.close()


@pytest.mark.parametrize("cancelled", [False, True])
def test_answers_flow_and_end_while_a_long_prompt_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    monkeypatch.setattr("livedraft.serving.local.engine._PREFILL_ROWS", 16)
    target = make_target(tmp_path / "t", "qwen3")
    make_drafter(tmp_path / "d", target)
    engine = start(target, tmp_path / "d", "none", max_running=4)
    prompts = [*PROMPTS[:3], [(7 * i) % 60 + 3 for i in range(150)]]
    lengths = [8, 40, 11, 20]  # the first and third end while the last is read, which has to move into their slots
    *short, long = [msgspec.structs.replace(r, max_tokens=n) for r, n in zip(greedy(prompts), lengths, strict=True)]
    client = Client(engine)
    order: list[str] = []

    def emit(delta: Delta) -> None:  # on the engine's thread: what it does next comes after it
        order.append(delta.request_id)
        client._emit(delta)
        if order.count("1") == 3 and "asked" not in order:
            order.append("asked")
            client.deltas["3"] = []
            engine.submit(long, emit)
        if cancelled and order.count("1") == 8:
            engine.cancel("3")

    for request in short:
        client.deltas[request.request_id] = []
        engine.submit(request, emit)
    for _ in prompts:
        client.ended.get(timeout=60)
    whole = [output[:n] for output, n in zip(expected(target, prompts), lengths, strict=True)]
    assert [client.tokens(str(i)) for i in range(3)] == whole[:3]
    meanwhile = order[order.index("asked") : order.index("3")]
    if cancelled:
        assert [(d.tokens, d.finish_reason) for d in client.deltas["3"]] == [((), "cancelled")]
        assert meanwhile.count("1") == 5
    else:
        assert client.tokens("3") == whole[3]
        assert meanwhile.count("1") == 9, "of ten pieces each but the last is followed by a round"
    assert engine.status().running == engine.status().waiting == 0
    engine.close()


def test_eos_and_max_tokens_and_stop_strings_end_a_request(target: Path, engine: LocalEngine) -> None:
    client = Client(engine)
    whole = expected(target, PROMPTS[:1], 40)[0]
    request = greedy(PROMPTS[:1])[0]
    client.run([request])
    assert client.last("0").finish_reason == "length"
    text = client.text("0")
    assert text == engine.decode(whole)
    stop = text[10:13]
    client.run([msgspec.structs.replace(request, request_id="s", stop=(stop,))])
    assert client.text("s") == text[: text.index(stop)]
    assert client.last("s").finish_reason == "stop"
    eos = engine.target.config.eos[0]
    sampled = [
        Generation(request_id=f"e{i}", prompt=(5, 9, 3), sampling=Sampling(seed=i, temperature=1.5), max_tokens=200)
        for i in range(20)
    ]
    outputs = client.run(sampled)
    ended = [o for i, o in enumerate(outputs) if client.last(f"e{i}").finish_reason == "stop"]
    assert ended
    assert all(o[-1] == eos and eos not in o[:-1] for o in ended)


def test_accept_length_counts_the_bonus_token(target: Path) -> None:
    engine = start(target, None, "none")
    client = Client(engine)
    client.run(greedy(PROMPTS[:1], 10))
    # The prefill gives the first token; every round of no speculation gives one more.
    assert (client.last("0").output_tokens, client.last("0").rounds) == (10, 9)
    engine.close()


def test_status_tells_the_gate_what_rounds_cost_and_the_watch_how_many_requests_had_full_ones(
    target: Path, drafter: Path
) -> None:
    engine = start(target, drafter)
    assert (engine.status().pass_s, engine.status().requests_by_drafter) == ({}, {})
    # Rounds near a request's end are shorter; one of two tokens has none of full depth.
    Client(engine).run(
        [*greedy(PROMPTS[:3], 80), msgspec.structs.replace(greedy(PROMPTS[:1], 2)[0], request_id="short")]
    )
    status = engine.status()
    assert status.requests_by_drafter == {"0": 3}
    assert 5 in status.pass_s
    assert 4 in status.draft_s
    assert 0 not in status.draft_s
    assert all(seconds > 0 for seconds in [*status.pass_s.values(), *status.draft_s.values()])
    engine.close()


def test_logprobs_are_the_targets(target: Path, engine: LocalEngine) -> None:
    client = Client(engine)
    request = greedy(PROMPTS[:1], 12)[0]
    client.run(
        [Generation(request_id="0", prompt=request.prompt, sampling=request.sampling, max_tokens=12, logprobs=3)]
    )
    found = [lp for d in client.deltas["0"] for lp in d.logprobs]
    tokens = client.tokens("0")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[0] + tokens])).logits[0, len(PROMPTS[0]) - 1 : -1]
    scores = logits.log_softmax(-1)
    assert [lp.token for lp in found] == tokens
    for lp, row in zip(found, scores, strict=True):
        assert lp.logprob == pytest.approx(float(row[lp.token]), abs=1e-3)
        assert [t for t, _ in lp.top] == row.topk(3).indices.tolist()


def test_cancelling_frees_the_slot_and_says_so(target: Path, drafter: Path) -> None:
    engine = start(target, drafter, max_running=1)
    client = Client(engine)
    first, second = greedy([PROMPTS[0]], 240)[0], greedy([PROMPTS[1]], 5)[0]
    client.submit(first)
    client.submit(Generation(request_id="w", prompt=second.prompt, sampling=second.sampling, max_tokens=240))
    engine.cancel("w")
    engine.cancel("unknown")
    assert client.ended.get(timeout=30) == "w"
    engine.cancel("0")
    assert client.ended.get(timeout=30) == "0"
    assert {client.last("0").finish_reason, client.last("w").finish_reason} == {"cancelled"}
    assert client.run([Generation(request_id="z", prompt=second.prompt, sampling=second.sampling, max_tokens=5)])
    engine.close()


def test_bad_requests_are_refused_by_field(engine: LocalEngine) -> None:
    def refuse(request: Generation) -> None:
        engine.submit(request, lambda delta: None)

    with pytest.raises(PromptTooLong, match="256 tokens"):
        refuse(Generation(request_id="a", prompt=tuple([5] * 200), max_tokens=100))
    with pytest.raises(BadRequest, match="prompt"):
        refuse(Generation(request_id="a", prompt=()))
    with pytest.raises(BadRequest, match=r"0\.\.63"):
        refuse(Generation(request_id="a", prompt=(64,)))
    with pytest.raises(BadRequest, match="max_tokens"):
        refuse(Generation(request_id="a", prompt=(5,), max_tokens=0))


def test_a_full_line_refuses_and_a_closing_engine_drains(target: Path, drafter: Path) -> None:
    engine = start(target, drafter, max_running=1, max_waiting=2)
    client = Client(engine)
    hold = threading.Event()
    engine.submit(greedy([PROMPTS[0]], 30)[0], lambda delta: [hold.wait(20)].clear())
    while engine.status().waiting:
        time.sleep(0.01)
    for name in "ab":
        client.submit(Generation(request_id=name, prompt=(5,), sampling=Sampling(temperature=0), max_tokens=8))
    with pytest.raises(Overloaded):
        client.submit(Generation(request_id="c", prompt=(5,)))
    hold.set()
    engine.close(timeout=30)
    assert [client.last(n).finish_reason for n in "ab"] == ["length", "length"]
    with pytest.raises(Overloaded):
        client.submit(Generation(request_id="d", prompt=(5,)))


@pytest.mark.parametrize("damage", ["truncated", "other target", "other shape", "checksum"])
def test_a_bad_drafter_is_refused_before_serving_is_touched(
    target: Path, engine: LocalEngine, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "bad"
    other = make_target(tmp_path / "t", "llama", vocab_size=80) if damage == "other target" else target
    checksum = make_drafter(folder, other, draft_vocab=40 if damage == "other shape" else 48)
    if damage == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-40])
    before = engine.status()
    asked = SwapRequest(path=str(folder), version="x", checksum="0" * 64 if damage == "checksum" else checksum)
    with pytest.raises(SwapFailed if damage == "checksum" else DrafterRejected):
        engine.swap(asked)
    assert engine.status().drafter_checksum == before.drafter_checksum
    assert Client(engine).run(greedy(PROMPTS)) == expected(target, PROMPTS)


def test_a_fault_inside_the_loop_reaches_every_request(
    target: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(target, drafter)
    ended: list[Delta] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine.target.cache.data = None  # type: ignore[assignment]
    engine.submit(greedy(PROMPTS[:1])[0], ended.append)
    engine._thread.join(10)
    assert ended[-1].finish_reason == "error"
    with pytest.raises(Overloaded, match="NoneType"):
        engine.status()
    with pytest.raises(Overloaded, match="NoneType"):
        engine.submit(greedy(PROMPTS[:1])[0], ended.append)


class Traces:
    """A sink that keeps, or refuses, what it is offered."""

    def __init__(self, accept: bool = True) -> None:
        self.accept = accept
        self.kept: list[Trace] = []
        self.dropped = 0

    def offer(self, trace: Trace) -> bool:
        if self.accept:
            self.kept.append(trace)
        self.dropped += not self.accept
        return self.accept

    def close(self, timeout: float = 5.0) -> None:
        pass


@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_traces_hold_every_round_as_the_target_sees_it(target: Path, drafter: Path, mode: str) -> None:
    sink = Traces()
    settings = EngineSettings(target=str(target), capture_topk=8, **MODES[mode])  # type: ignore[arg-type]
    engine = LocalEngine(settings, drafter=drafter, drafter_version="v1", sink=sink)
    Client(engine).run(greedy(PROMPTS[:3], 25), 3)
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert len(sink.kept) == 3
    for trace in sink.kept:
        validate(trace)
        rounds = {f: _numpy(getattr(trace.rounds, f)) for f in trace.rounds.__struct_fields__}
        sequence = [*_numpy(trace.prompt).tolist(), *_numpy(trace.output).tolist()]
        assert rounds["size"].sum() == len(rounds["tokens"]) == len(rounds["accepted"])
        assert rounds["top_ids"].shape == (len(rounds["tokens"]) + len(rounds["root"]), 8)
        assert trace.drafters == ("v1",)
        at_node = at_row = 0
        position = len(trace_prompt := _numpy(trace.prompt))
        assert rounds["root"][0] == len(trace_prompt) - 1
        for r, root in enumerate(rounds["root"].tolist()):
            size = int(rounds["size"][r])
            assert root == position - 1
            tokens = rounds["tokens"][at_node : at_node + size].tolist()
            parents = rounds["parents"][at_node : at_node + size].tolist()
            accepted = [i for i in range(size) if rounds["accepted"][at_node + i]]
            committed = [tokens[i] for i in accepted] + [int(rounds["bonus"][r])]
            assert sequence[position : position + len(committed)] == committed[: len(sequence) - position]
            for node in range(-1, size):
                branch: list[int] = []
                walk = node
                while walk >= 0:
                    branch.insert(0, tokens[walk])
                    walk = parents[walk]
                with torch.inference_mode():
                    logits = model(torch.tensor([sequence[: root + 1] + branch])).logits[0, -1]
                scores = logits.log_softmax(-1).numpy()
                row = at_row + node + 1
                np.testing.assert_allclose(scores[rounds["top_ids"][row]], rounds["top_logprobs"][row], atol=2e-3)
                np.testing.assert_allclose(
                    rounds["tail"][row], 1 - np.exp(rounds["top_logprobs"][row]).sum(), atol=1e-3
                )
            position += len(committed)
            at_node += size
            at_row += size + 1
        features = trace.features.values
        assert features is not None
        assert features.shape[0] == len(sequence) - 1
        with torch.inference_mode():
            states = model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
        wanted = torch.cat([states[layer + 1][0] for layer in trace.features.layers], -1)[:-1]
        held = torch.from_numpy(np.frombuffer(features.data, "<i2").copy()).view(torch.bfloat16).view(features.shape)
        torch.testing.assert_close(held[: len(wanted)].float(), wanted, atol=2e-2, rtol=2e-2)


def test_a_refusing_sink_costs_nothing_but_the_trace(target: Path, drafter: Path) -> None:
    engine = LocalEngine(EngineSettings(target=str(target)), drafter=drafter, sink=Traces(accept=False))
    assert Client(engine).run(greedy(PROMPTS)) == expected(target, PROMPTS)
    deadline = time.monotonic() + 10
    while engine.status().traces_dropped < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.status().traces_offered, engine.status().traces_dropped) == (5, 5)
    engine.close()


def test_an_opted_out_request_is_not_recorded(target: Path, drafter: Path) -> None:
    sink = Traces()
    engine = LocalEngine(EngineSettings(target=str(target)), drafter=drafter, sink=sink)
    Client(engine).run([Generation(request_id="0", prompt=(5, 9), max_tokens=5, traced=False)])
    engine.close()
    assert sink.kept == []


def test_the_bundled_target_speaks_its_chat_template() -> None:
    engine = LocalEngine(EngineSettings())
    prompt = engine.render([{"role": "user", "content": "In the beginning"}])
    assert engine.decode(prompt).endswith("assistant\n")
    assert engine.folder == BUNDLED
    engine.close()


def _numpy(array: object) -> np.ndarray:
    from livedraft.contracts.messages import Array

    assert isinstance(array, Array)
    return np.frombuffer(array.data, "<" + array.dtype).reshape(array.shape)
