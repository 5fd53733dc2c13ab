"""Small targets, drafters and traces, made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from livedraft.contracts.messages import Features, Rounds, Sampling, Trace
from livedraft.traces.arrays import from_numpy
from livedraft.trainer.model import Drafter
from livedraft.trainer.target import Target, fresh_config, read_target
from safetensors.torch import save_file

HIDDEN, VOCAB = 16, 40
TraceMaker = Callable[..., Trace]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder holding only what a drafter needs of it."""
    folder = tmp_path_factory.mktemp("target")
    g = torch.Generator().manual_seed(1)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=g),
        "model.norm.weight": torch.rand(HIDDEN, generator=g) + 0.5,
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def target(target_folder: Path) -> Target:
    return read_target(target_folder)


@pytest.fixture
def drafter(target: Target) -> Drafter:
    """A drafter with loud weights, so that a wrong key or position shows."""
    drafter = Drafter.fresh(target, fresh_config(target), seed=3)
    with torch.no_grad():
        for parameter in drafter.midlayer.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return drafter


def make_trace(
    prompt: Sequence[int],
    rounds: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool], int]],
    *,
    length: int | None = None,
    number: int = 0,
    temperature: float = 0.7,
    k: int = 4,
    first: int = 5,
    logprobs: Sequence[float] | None = None,
    **fields: Any,
) -> Trace:
    """A trace whose ``rounds`` are (proposed, parents, accepted, bonus); output starts with ``first``.

    Features and target rows are drawn from ``number``.  ``length`` cuts prompt + output.
    """
    rng = np.random.default_rng(number)
    tokens, root = [*prompt, first], []
    for proposed, _, accepted, bonus in rounds:
        root.append(len(tokens) - 1)
        tokens += [t for t, a in zip(proposed, accepted, strict=True) if a] + [bonus]
    tokens = tokens[:length]
    size = [len(r[0]) for r in rounds]
    rows = sum(size) + len(size)
    p = np.sort(rng.dirichlet(np.ones(VOCAB), rows))[:, ::-1][:, :k]
    ids = np.stack([rng.permutation(VOCAB)[:k] for _ in range(rows)]) if rows else np.zeros((0, k), int)
    nodes = [n for r in rounds for n in r[0]]
    made = Rounds(
        root=from_numpy(np.array(root, int), "i4"),
        size=from_numpy(np.array(size, int), "i4"),
        drafter=from_numpy(np.zeros(len(root), int), "i2"),
        tokens=from_numpy(np.array(nodes, int), "i4"),
        parents=from_numpy(np.array([n for r in rounds for n in r[1]], int), "i2"),
        logprobs=from_numpy(np.array([-1.0] * len(nodes) if logprobs is None else logprobs), "f4"),
        accepted=from_numpy(np.array([n for r in rounds for n in r[2]], int), "u1"),
        bonus=from_numpy(np.array([r[3] for r in rounds], int), "i4"),
        top_ids=from_numpy(ids, "i4"),
        top_logprobs=from_numpy(np.log(p), "f4"),
        tail=from_numpy(1 - p.sum(1), "f4"),
    )
    values = rng.standard_normal((len(tokens) - 1, 3 * HIDDEN)).astype(np.float32)
    defaults: dict[str, Any] = {
        "trace_id": f"trace-{number}",
        "request_id": f"request-{number}",
        "engine": "e",
        "target": "tiny",
        "target_revision": "r",
        "tokenizer_hash": "h",
        "drafters": ("1",),
        "started_at": 0.0,
        "finished_at": 1.0,
        "sampling": Sampling(temperature=temperature),
        "top_temperature": temperature or 1.0,
        "finish_reason": "length",
        "prompt": from_numpy(np.array(prompt, int), "i4"),
        "output": from_numpy(np.array(tokens[len(prompt) :], int), "i4"),
        "rounds": made,
        "features": Features(mode="inline", layers=(1, 3, 4), values=from_numpy(values, "f4")),
    }
    return Trace(**(defaults | fields))


@pytest.fixture
def trace_of() -> TraceMaker:
    return make_trace


@pytest.fixture
def random_trace() -> TraceMaker:
    """A chain-drafted trace of about ``tokens`` output tokens drawn from ``number``."""

    def make(number: int, *, tokens: int = 20, **fields: Any) -> Trace:
        rng = np.random.default_rng(1000 + number)
        rounds = []
        for _ in range(tokens // 2):
            size, kept = 3, int(rng.integers(0, 4))
            proposed = [int(t) for t in rng.integers(0, VOCAB, size)]
            rounds.append((proposed, [-1, 0, 1], [i < kept for i in range(size)], int(rng.integers(0, VOCAB))))
        prompt = [int(t) for t in rng.integers(0, VOCAB, int(rng.integers(2, 8)))]
        return make_trace(prompt, rounds, number=number, **fields)

    return make
