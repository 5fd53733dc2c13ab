"""From verify rounds to traces, off the engine's thread.

The engine only keeps references to what a round already computed; one hand-over per request wakes a thread of low
priority that takes top-K, log-probabilities and bytes out of them.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from livedraft.contracts.messages import Array, Features, FinishReason, Generation, Rounds, Trace
from livedraft.contracts.ports import TraceSink
from livedraft.kernels.features import pack_rows
from livedraft.serving.local.propose import Proposal
from torch import Tensor

#: In what traces carry features, or that they leave them to be computed again.
FeatureMode = Literal["bf16", "fp8", "recompute"]

_NICE = 10
#: Rounds whose logits are looked at together.
_ROUNDS = 32


@dataclass(frozen=True, slots=True)
class Origin:
    """What every trace of an engine has in common."""

    engine: str
    target: str
    target_revision: str
    tokenizer_hash: str
    layers: tuple[int, ...]


@dataclass(slots=True)
class Recording:
    """The rounds of one request as the engine went through them; handed over whole when it ends."""

    started_at: float
    rounds: list[tuple[int, Proposal, Sequence[int], int, str, Tensor]] = field(default_factory=list)
    #: Of the positions computed so far, in order; none where they are not sent.
    features: list[Tensor] = field(default_factory=list)
    #: Bytes held, for the bound on what waits.
    size: int = 0

    def add(self, root: int, proposal: Proposal, path: Sequence[int], bonus: int, drafter: str, logits: Tensor) -> None:
        """A verify round: logits float32 [n + 1, V], root row first."""
        self.rounds.append((root, proposal, path, bonus, drafter, logits))
        self.size += logits.numel() * 4


class Capture:
    """Turns recordings into traces and offers them to a sink; drops (and counts) when it falls behind.

    Engine's loop: ``recording.add(...)`` each round, ``capture.finish(recording, ...)`` when the request ends.
    """

    def __init__(
        self, sink: TraceSink, origin: Origin, *, topk: int, buffer_bytes: int, eight_bits: bool = False
    ) -> None:
        self._sink = sink
        self._origin = origin
        self._topk = topk
        self._eight_bits = eight_bits
        self._buffer = buffer_bytes
        self._waiting = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[Recording, Generation, list[int], FinishReason] | None] = (
            queue.SimpleQueue()
        )
        self.offered = 0
        self._overflowed = 0
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def finish(self, recording: Recording, request: Generation, tokens: list[int], reason: FinishReason) -> None:
        """Hand a finished request over.  Never blocks."""
        with self._lock:
            self.offered += 1
            if self._waiting + recording.size > self._buffer:
                self._overflowed += 1
                return
            self._waiting += recording.size
        self._queue.put((recording, request, tokens, reason))

    @property
    def dropped(self) -> int:
        """Traces lost before the sink or in it."""
        return self._overflowed + self._sink.dropped

    def close(self) -> None:
        """Finish what was handed over."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while (item := self._queue.get()) is not None:
            recording, request, tokens, reason = item
            self._sink.offer(trace(recording, request, tokens, reason, self._origin, self._topk, self._eight_bits))
            with self._lock:
                self._waiting -= recording.size


@torch.inference_mode()
def trace(
    recording: Recording,
    request: Generation,
    tokens: list[int],
    reason: FinishReason,
    origin: Origin,
    topk: int,
    eight_bits: bool = False,
) -> Trace:
    """The trace of one finished request; ``tokens`` is prompt and output."""
    temperature = request.sampling.temperature or 1.0
    rounds = recording.rounds
    drafters = tuple(dict.fromkeys(version for *_, version, _ in rounds))
    ids, values, tails, logprobs = [], [], [], [torch.empty(0)]
    # In pieces: one round after another is slow, all at once doubles the memory.
    for at in range(0, len(rounds), _ROUNDS):
        logprobs += _proposed([p for _, p, *_ in rounds[at : at + _ROUNDS]], temperature)
        logits = torch.cat([r[5] for r in rounds[at : at + _ROUNDS]])
        scaled = torch.log_softmax(logits / temperature, -1)
        best = scaled.topk(min(topk, scaled.shape[-1]))
        ids.append(best.indices.int())
        values.append(best.values)
        tails.append((1 - best.values.exp().sum(-1)).clamp_(min=0))
    nodes = [p for _, p, *_ in rounds]
    prompt = len(request.prompt)
    accepted = b"".join(_flags(len(p), path) for _, p, path, *_ in rounds)
    return Trace(
        trace_id=f"{origin.engine}/{request.request_id}",
        request_id=request.request_id,
        engine=origin.engine,
        target=origin.target,
        target_revision=origin.target_revision,
        tokenizer_hash=origin.tokenizer_hash,
        drafters=drafters,
        started_at=recording.started_at,
        finished_at=time.time(),
        sampling=request.sampling,
        top_temperature=temperature,
        finish_reason=reason,
        prompt=_integers(tokens[:prompt], "i4"),
        output=_integers(tokens[prompt:], "i4"),
        rounds=Rounds(
            root=_integers([r[0] for r in rounds], "i4"),
            size=_integers([len(p) for p in nodes], "i4"),
            drafter=_integers([drafters.index(r[4]) for r in rounds], "i2"),
            tokens=_integers([t for p in nodes for t in p.tokens], "i4"),
            parents=_integers([i for p in nodes for i in p.parents], "i2"),
            logprobs=_floats(torch.cat(logprobs)),
            accepted=Array(dtype="u1", shape=(len(accepted),), data=accepted),
            bonus=_integers([r[3] for r in rounds], "i4"),
            top_ids=_tensor(torch.cat(ids), "i4"),
            top_logprobs=_floats(torch.cat(values)),
            tail=_floats(torch.cat(tails)),
        ),
        features=_features(recording, origin, len(tokens) - 1, eight_bits),
        tenant=request.tenant,
        domain=request.domain,
    )


def _proposed(proposals: Sequence[Proposal], temperature: float) -> list[Tensor]:
    """The drafter's log-probabilities of what was proposed."""
    drafted = [(p.logits, p.rows) for p in proposals if p.logits is not None and p.rows is not None]
    if not drafted:
        return []
    logits, rows = (torch.cat(parts) for parts in zip(*drafted, strict=True))
    return [torch.log_softmax(logits / temperature, -1).gather(1, rows[:, None])[:, 0]]


def _flags(nodes: int, path: Sequence[int]) -> bytes:
    """1 for each of a round's nodes that was accepted."""
    flags = bytearray(nodes)
    for node in path:
        flags[node] = 1
    return bytes(flags)


def _features(recording: Recording, origin: Origin, known: int, eight_bits: bool) -> Features:
    if not recording.features:
        return Features(mode="recompute", layers=origin.layers)
    # A last round cut short by a stop leaves rows of tokens that were never committed.
    values = torch.cat(recording.features)[:known].to(torch.bfloat16)
    if eight_bits:
        packed, scale = pack_rows(values)
        bits = Array(dtype="e4m3", shape=tuple(packed.shape), data=packed.view(torch.uint8).numpy().tobytes())
        return Features(mode="inline", layers=origin.layers, values=bits, scale=_floats(scale))
    return Features(mode="inline", layers=origin.layers, values=_tensor(values.view(torch.int16), "bf2"))


def _integers(values: Sequence[int], dtype: str) -> Array:
    array = np.asarray(values, "<" + dtype)
    return Array(dtype="i4" if dtype == "i4" else "i2", shape=array.shape, data=array.tobytes())


def _floats(values: Tensor) -> Array:
    return Array(dtype="f4", shape=tuple(values.shape), data=values.float().numpy().tobytes())


def _tensor(values: Tensor, dtype: str) -> Array:
    return Array(dtype="bf2" if dtype == "bf2" else "i4", shape=tuple(values.shape), data=values.numpy().tobytes())
