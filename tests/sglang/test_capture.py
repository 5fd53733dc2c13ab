"""Traces of a real SGLang against those of the embedded engine, which specifies them.

Both serve the same target with the same drafter greedily, so that every round can be held against its twin.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from livedraft.contracts.messages import Delta, Generation, Sampling, Trace
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.serving.local.engine import LocalEngine
from livedraft.traces.arrays import to_float32, to_numpy

from .plugged import Engine, capturing, engine
from .relay import Relay
from .server import Server, Speculation
from .told import assert_same_features, assert_same_rounds, assert_same_target, rounds_of

STEPS, TOKENS = 3, 40
#: Prompts of more tokens are prefilled in chunks of as many.
CHUNK = 48
#: Bytes for traces: of one or two requests at a time.
ROOM = 400_000


class Specification:
    """The embedded engine with the same drafter; its traces by request."""

    def __init__(self, drafter: Path, **settings: Any) -> None:
        self._traces: dict[str, Trace] = {}
        self._ended: queue.Queue[str] = queue.Queue()
        threads = torch.get_num_threads()
        self._engine = LocalEngine(
            EngineSettings(**{"draft_depth": STEPS, "adaptive_depth": False} | settings), drafter=drafter, sink=self
        )
        torch.set_num_threads(threads)
        self._number = 0

    dropped = 0

    def offer(self, trace: Trace) -> bool:
        self._traces[trace.request_id] = trace
        return True

    def close(self, timeout: float = 5.0) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text)

    def end(self) -> None:
        self._engine.close()

    def traces(self, prompts: Sequence[str], **fields: Any) -> list[Trace]:
        """One per prompt."""
        names = []
        for prompt in prompts:
            self._number += 1
            names.append(f"specified-{self._number}")
            request = Generation(
                request_id=names[-1],
                prompt=tuple(self.encode(prompt)),
                sampling=Sampling(temperature=0.0),
                **{"max_tokens": TOKENS, "ignore_eos": True} | fields,
            )
            self._engine.submit(request, self._emit)
        for _ in names:
            assert self._ended.get(timeout=120) in ("length", "stop")
        while any(name not in self._traces for name in names):
            torch.empty(0)
        return [self._traces[name] for name in names]

    def _emit(self, delta: Delta) -> None:
        if delta.finish_reason:
            self._ended.put(delta.finish_reason)


@contextlib.contextmanager
def specified(drafter: Path, **settings: Any) -> Iterator[Specification]:
    specification = Specification(drafter, **settings)
    try:
        yield specification
    finally:
        specification.end()


def ask_together(server: Server, relay: Relay, prompts: Sequence[str], kind: str, **fields: Any) -> list[Trace]:
    """The traces of one request per prompt, all asked for at once."""
    names = [f"{kind}-{number}" for number in range(len(prompts))]
    bodies = [{"text": p, "rid": n, "sampling_params": sampling(**fields)} for p, n in zip(prompts, names, strict=True)]
    answers = ask(server, bodies)
    traces = relay.take(names)
    for answer, trace in zip(answers, traces, strict=True):
        assert to_numpy(trace.output).tolist()[: len(answer["output_ids"])] == answer["output_ids"]
    return traces


def ask(server: Server, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: server.post("/generate", body), bodies))


def sampling(**fields: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True} | fields


@pytest.fixture(scope="module")
def specification(trained_drafter: Path) -> Iterator[Specification]:
    with specified(trained_drafter) as specification:
        yield specification


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, trained_drafter: Path) -> Iterator[tuple[Server, Relay]]:
    arguments = [f"--chunked-prefill-size={CHUNK}"]
    speculation = Speculation(trained_drafter, steps=STEPS)
    opted_out = {"LIVEDRAFT_TRACES__OPTED_OUT": "other,discreet"}
    with capturing(tmp_path_factory.mktemp("capture"), speculation, arguments, **opted_out) as served:
        yield served


def test_rounds_of_a_chain_are_those_of_the_embedded_engine(
    chain: tuple[Server, Relay], specification: Specification, prompts: list[str]
) -> None:
    traces = ask_together(*chain, prompts, "chain")
    for told, expected in zip(traces, specification.traces(prompts), strict=True):
        assert_same_rounds(told, expected, steps=STEPS)
        assert_same_features(told, expected)
        assert told.engine == "sglang"
        assert (told.target_revision, told.tokenizer_hash) == (expected.target_revision, expected.tokenizer_hash)
        assert (told.tenant, told.domain, told.finish_reason) == ("default", "default", "length")
    assert sum(len(r.nodes) > 0 and r.nodes[max(r.nodes, key=len)].accepted for t in traces for r in rounds_of(t))


def test_a_long_prompt_in_chunks_and_again_from_the_cache(
    chain: tuple[Server, Relay], specification: Specification, prompts: list[str]
) -> None:
    longest = "\n".join(prompts)
    while len(specification.encode(longest)) > 3 * CHUNK + 5:
        longest = longest[: -max(1, len(longest) // 50)]
    expected = specification.traces([longest])[0]
    length = len(to_numpy(expected.prompt))
    assert length > 2 * CHUNK
    server, relay = chain
    # SGLang computes the last token anew, and for a drafter the one before.
    for name, start in (("cold", range(CHUNK)), ("cached", range(length - 2, length))):
        told = ask_together(server, relay, [longest], name)[0]
        assert told.features.start in start
        assert_same_rounds(told, expected, steps=STEPS)
        assert_same_features(told, expected)


def test_a_round_cut_by_a_stop_string(
    chain: tuple[Server, Relay], specification: Specification, prompts: list[str]
) -> None:
    server, relay = chain
    for number, prompt in enumerate(prompts[:4]):
        text = server.generate(prompt, max_new_tokens=TOKENS)["text"]
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        told = ask_together(server, relay, [prompt], f"stop-{number}", stop=[stop])[0]
        expected = specification.traces([prompt], stop=(stop,))[0]
        assert told.finish_reason == "stop"
        assert_same_rounds(told, expected, steps=STEPS)
        assert_same_features(told, expected)


def test_a_round_cut_by_the_limit(
    chain: tuple[Server, Relay], specification: Specification, prompts: list[str]
) -> None:
    for tokens in (1, 2, 3, 5, 6):
        told = ask_together(*chain, prompts[:2], f"limit-{tokens}", max_new_tokens=tokens)
        for mine, expected in zip(told, specification.traces(prompts[:2], max_tokens=tokens), strict=True):
            assert_same_rounds(mine, expected, steps=STEPS)
            assert_same_features(mine, expected)


def test_a_client_that_leaves(chain: tuple[Server, Relay], specification: Specification, prompts: list[str]) -> None:
    server, relay = chain
    body = {"text": prompts[0], "rid": "left", "stream": True, "sampling_params": sampling(max_new_tokens=400)}
    address = urllib.parse.urlparse(server.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        data = json.dumps(body).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        client.sendall(head.encode() + b"\r\n\r\n" + data)
        while b"data:" not in client.recv(1 << 16):
            pass
    told = relay.take(["left"])[0]
    assert told.finish_reason == "cancelled"
    length = len(to_numpy(told.output))
    assert 0 < length < 400
    assert_same_target(told, specification.traces([prompts[0]], max_tokens=length)[0])


def test_labels_opt_outs_and_sampling(chain: tuple[Server, Relay], prompts: list[str]) -> None:
    server, relay = chain

    def told(name: str, labels: dict[str, Any], **fields: Any) -> dict[str, Any]:
        params = sampling(custom_params={"livedraft": labels}, **fields)
        return {"text": prompts[0], "rid": name, "sampling_params": params}

    ask(
        server,
        [
            told("discreet", {"tenant": "discreet"}),
            told("untraced", {"traced": False}),
            told("labelled", {"tenant": "acme", "domain": "verse"}),
            told("warm", {}, temperature=0.5, top_p=0.9, top_k=20),
            told("last", {}),
        ],
    )
    labelled, warm, greedy = relay.take(["labelled", "warm", "last"])
    assert (labelled.tenant, labelled.domain) == ("acme", "verse")
    assert (warm.sampling, warm.top_temperature) == (Sampling(temperature=0.5, top_p=0.9, top_k=20), 0.5)
    assert (greedy.sampling, greedy.top_temperature) == (Sampling(temperature=0.0), 1.0)
    # Log-odds are divided by the temperature.
    warm_odds, odds = (to_float32(t.rounds.top_logprobs)[0] for t in (warm, greedy))
    np.testing.assert_allclose((warm_odds - warm_odds[0]) * 0.5, odds - odds[0], atol=2e-3)
    total = np.exp(warm_odds).sum() + to_float32(warm.rounds.tail)[0]
    assert total == pytest.approx(1, abs=1e-4)
    assert not relay.has("discreet")
    assert not relay.has("untraced")


def test_a_relay_that_is_gone_costs_nothing(chain: tuple[Server, Relay], prompts: list[str]) -> None:
    server, relay = chain
    before = server.generate(prompts[0], max_new_tokens=TOKENS)["output_ids"]
    relay.close()
    answers = server.generate_together(prompts, max_new_tokens=TOKENS)
    assert answers[0]["output_ids"] == before
    assert all(len(answer["output_ids"]) == TOKENS for answer in answers)


#: How deep SGLang's trees are those of the embedded engine (see ``assert_same_rounds``).
EXACT = 2


def test_trees_are_those_of_the_embedded_engine(
    tree: tuple[Server, Relay], trained_drafter: Path, prompts: list[str]
) -> None:
    with specified(trained_drafter, draft_depth=3, tree_topk=4, tree_nodes=7) as specification:
        assert_same_trees(ask_together(*tree, prompts, "tree"), specification, prompts, steps=3)


def assert_same_trees(traces: Sequence[Trace], by: Specification, prompts: Sequence[str], *, steps: int) -> None:
    rounds = [r for told in traces for r in rounds_of(told)]
    for told, expected in zip(traces, by.traces(prompts), strict=True):
        assert_same_rounds(told, expected, steps=steps, exact=EXACT)
        assert_same_target(told, expected)
    assert any(len({line[0] for line in r.nodes}) > 1 for r in rounds)
    assert any(len(r.committed) == steps + 1 for r in rounds)


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory, trained_drafter: Path) -> Iterator[tuple[Server, Relay]]:
    """Changes its depth, and retracts requests; until the last of its tests ends it."""
    arguments = [
        "--speculative-adaptive",
        "--cuda-graph-backend-decode=disabled",
        "--cuda-graph-backend-prefill=disabled",
    ]
    retract = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    speculation = Speculation(trained_drafter, steps=STEPS)
    with capturing(tmp_path_factory.mktemp("adaptive"), speculation, arguments, **retract) as served:
        yield served


def test_retraction_and_changing_depths(
    adaptive: tuple[Server, Relay], specification: Specification, prompts: list[str]
) -> None:
    server, relay = adaptive
    traces = ask_together(server, relay, prompts, "adaptive")
    assert "Retract requests" in server.log.read_text() or "retraction" in server.log.read_text()
    sizes = {len(r.nodes) for told in traces for r in rounds_of(told)}
    assert len(sizes) > 1
    for told, expected in zip(traces, specification.traces(prompts), strict=True):
        assert_same_target(told, expected)
    assert any((to_numpy(t.rounds.size)[1:] == 0).any() for t in traces)


def test_what_waits_in_the_plugin_is_sent_when_sglang_is_told_to_end(
    adaptive: tuple[Server, Relay], prompts: list[str]
) -> None:
    """The relay is away until the plugin closes; it is the last test of ``adaptive``."""
    server, relay = adaptive
    relay.close()
    names = [f"late-{n}" for n in range(len(prompts))]
    bodies = [{"text": p, "rid": n, "sampling_params": sampling()} for p, n in zip(prompts, names, strict=True)]
    answers = ask(server, bodies)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(server.terminate)
        while "livedraft ends" not in server.log.read_text():
            assert not ended.done(), "it ended, and the plugin heard nothing of it"
            time.sleep(0.05)
        with contextlib.closing(Relay(relay.url)) as back:
            assert ended.result() == 0
            traces = back.take(names, timeout=1)
    for answer, told in zip(answers, traces, strict=True):
        assert to_numpy(told.output).tolist() == answer["output_ids"]


def test_too_little_room_gives_up_the_youngest_and_tells_the_others_whole(
    tmp_path: Path, trained_drafter: Path, prompts: list[str]
) -> None:
    """Trees of no more than two levels, so that every node is exact."""
    speculation = Speculation(trained_drafter, steps=EXACT, topk=4)
    room: dict[str, Any] = {"LIVEDRAFT_TRACES__BUFFER_BYTES": str(ROOM)}
    with (
        contextlib.closing(Relay()) as relay,
        engine(tmp_path, speculation, LIVEDRAFT_TRACES__URL=relay.url, **room) as one,
        specified(trained_drafter, draft_depth=EXACT, tree_topk=4, tree_nodes=7) as specification,
    ):
        server = one.server
        one_by_one = [ask_together(server, relay, [prompt], f"alone-{n}")[0] for n, prompt in enumerate(prompts)]
        assert_same_trees(one_by_one, specification, prompts, steps=EXACT)
        bodies = [
            {"text": prompt, "rid": f"room-{n}", "sampling_params": sampling()} for n, prompt in enumerate(prompts)
        ]
        answers = ask(server, bodies)
        assert all(len(answer["output_ids"]) == TOKENS for answer in answers)
        ask_together(server, relay, prompts[:1], "last")
        kept = [n for n in range(len(prompts)) if relay.has(f"room-{n}")]
        assert 0 < len(kept) < len(prompts)
        for told, n in zip(relay.take([f"room-{n}" for n in kept]), kept, strict=True):
            assert_same_rounds(told, specification.traces([prompts[n]])[0], steps=EXACT)
        dropped = len(prompts) - len(kept)
        assert_counted(one, dropped=dropped)
        relay.close()
        for _ in range(12):
            server.generate(prompts[0], max_new_tokens=TOKENS)
        assert_counted(one, dropped=dropped + 1)


def assert_counted(one: Engine, *, dropped: int) -> None:
    """The plugin's status tells of at least as many traces that were not sent; a sink counts a moment later."""
    deadline = time.monotonic() + 20
    while True:
        status = one.admin.status()
        assert status.capture
        assert status.traces_offered >= status.traces_dropped
        if status.traces_dropped >= dropped:
            break
        assert time.monotonic() < deadline, f"{status.traces_dropped} traces dropped, expected {dropped}"
        time.sleep(0.2)
