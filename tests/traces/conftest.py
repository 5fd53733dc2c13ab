"""Traces to test with: consistent ones, from a seed."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st
from livedraft.contracts.messages import Features, Rounds, Sampling, Trace
from livedraft.contracts.settings import Kafka
from livedraft.traces.arrays import from_numpy


class MakeTrace(Protocol):
    def __call__(self, seed: int = 0, *, rounds: int = 4, width: int = 6, mode: str = "inline", **fields: Any) -> Trace:
        """A trace whose rounds, tokens and features agree with one another."""


def build_trace(seed: int = 0, *, rounds: int = 4, width: int = 6, mode: str = "inline", **fields: Any) -> Trace:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 1000, 1 + seed % 5).tolist()
    text, root, sizes, bonus = list(prompt), [], [], []
    tokens: list[int] = []
    parents: list[int] = []
    accepted: list[int] = []
    for _ in range(rounds):
        size = int(rng.integers(0, 5))
        root.append(len(text) - 1)
        sizes.append(size)
        proposed = rng.integers(0, 1000, size).tolist()
        links = [int(rng.integers(-1, node)) if node else -1 for node in range(size)]
        hits, at = [0] * size, -1
        for node in range(size):
            if links[node] == at and rng.random() < 0.7:
                hits[node], at = 1, node
                text.append(proposed[node])
        tokens += proposed
        parents += links
        accepted += hits
        bonus.append(int(rng.integers(0, 1000)))
        text.append(bonus[-1])
    rows, nodes, topk = len(tokens) + rounds, len(tokens), 3
    features = Features(mode="recompute")
    if mode == "inline":
        values = rng.standard_normal((len(text), width), np.float32)
        features = Features(mode="inline", layers=(1, 5, 9), values=from_numpy(values, "bf2"))
    if mode == "fp8":
        bits = rng.integers(0, 127, (len(text), width)) + 128 * rng.integers(0, 2, (len(text), width))
        scale = from_numpy(rng.lognormal(size=len(text)), "f4")
        features = Features(mode="inline", layers=(1, 5, 9), values=from_numpy(bits, "e4m3"), scale=scale)
    probabilities = rng.dirichlet(np.ones(topk + 1), rows).reshape(rows, topk + 1)
    best_first = -np.sort(-probabilities[:, :topk], axis=1)
    trace = Trace(
        trace_id=f"t{seed}",
        request_id=f"r{seed}",
        engine="test",
        target="tiny",
        target_revision="1",
        tokenizer_hash="abc",
        drafters=("7", "8"),
        started_at=1.5,
        finished_at=2.5,
        sampling=Sampling(temperature=0.7, seed=seed),
        top_temperature=0.7,
        finish_reason="length",
        prompt=from_numpy(prompt, "i4"),
        output=from_numpy(text[len(prompt) :], "i4"),
        rounds=Rounds(
            root=from_numpy(root, "i4"),
            size=from_numpy(sizes, "i4"),
            drafter=from_numpy([int(r >= rounds // 2) for r in range(rounds)], "i2"),
            tokens=from_numpy(tokens, "i4"),
            parents=from_numpy(parents, "i2"),
            logprobs=from_numpy(-rng.random(nodes), "f4"),
            accepted=from_numpy(accepted, "u1"),
            bonus=from_numpy(bonus, "i4"),
            top_ids=from_numpy(rng.integers(0, 1000, (rows, topk)), "i4"),
            top_logprobs=from_numpy(np.log(best_first), "f4"),
            tail=from_numpy(probabilities[:, topk], "f4"),
        ),
        features=features,
    )
    return msgspec.structs.replace(trace, **fields)


@pytest.fixture(scope="session")
def make_trace() -> MakeTrace:
    return build_trace


@pytest.fixture(scope="session")
def any_trace() -> st.SearchStrategy[Trace]:
    return st.builds(
        build_trace,
        st.integers(0, 1 << 30),
        rounds=st.integers(0, 6),
        width=st.sampled_from([3, 6, 30]),
        mode=st.sampled_from(["inline", "fp8", "recompute"]),
        domain=st.text(max_size=5),
        tenant=st.text(max_size=5),
        consent=st.booleans(),
        started_at=st.floats(0, 1e12),
        finish_reason=st.sampled_from(["stop", "length", "cancelled", "error"]),
    )


@pytest.fixture
def kafka_settings() -> Callable[..., Kafka]:
    """Settings with topics of one's own, and timeouts of a test."""
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    given: dict[str, Any] = {"prefix": prefix, "partitions": 4, "session_timeout_s": 2.0}
    return lambda **more: Kafka(**(given | more))
