"""Messages between the processes: frozen records that nobody changes after receiving them.

A trace is what one request teaches.  Sizes used in the comments: T committed tokens (prompt P + output),
R verify rounds, M proposed nodes over all rounds, K target candidates kept per node, d target hidden size.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 1

#: Little-endian scalar types of an ``Array``: numpy's letters, with ``bf2`` for bfloat16, ``u1`` for bytes and, since
#: schema 1.1, ``e4m3`` for the 8-bit float of that name without infinities (arXiv 2209.05433).
DType = Literal["f4", "f2", "bf2", "e4m3", "i8", "i4", "i2", "u1"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every message."""


class Array(Record, frozen=True, kw_only=True, array_like=True, omit_defaults=False):
    """A dense row-major tensor as raw little-endian bytes."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes


class Sampling(Record, frozen=True, kw_only=True):
    """How a request draws its tokens.

    ``temperature`` 0 is greedy.  Order of operations: temperature, then top-k, then top-p on what is left
    (the order of transformers and SGLang).  ``top_k`` 0 means no limit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class Generation(Record, frozen=True, kw_only=True):
    """One sequence to generate: what the gateway hands an engine."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    #: Log-probabilities per output token: None for none, else how many alternatives (0: the token's own only).
    logprobs: int | None = None
    ignore_eos: bool = False
    tenant: str = "default"
    #: Free-form label of the traffic (a route, a product); drift and replay are kept per domain.
    domain: str = "default"
    #: False: nothing of this request leaves the engine process.
    traced: bool = True


class TokenLogprob(Record, frozen=True, kw_only=True):
    """Log-probability of one output token under the target at temperature 1, and its best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Delta(Record, frozen=True, kw_only=True):
    """What one engine step adds to one request; the last one carries ``finish_reason``.

    ``text`` never shows half a character nor a prefix of a stop string that may still complete.
    ``rounds`` and ``drafter`` are running totals / current values, for the usage block.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    #: Set with finish_reason "error".
    error: str | None = None
    #: Output tokens so far, and verify rounds.  The prefill yields the first token, each round those it commits:
    #: accept length = (output_tokens - 1) / rounds.
    output_tokens: int = 0
    rounds: int = 0
    #: Version of the drafter that proposed in the latest round ("" while not speculating).
    drafter: str = ""


class Rounds(Record, frozen=True, kw_only=True):
    """Every verify round of a request, struct of arrays.

    Node rows: round r owns ``1 + size[r]`` consecutive rows of the ``top_*`` arrays and of ``tail``: first
    its root, then its nodes in the order of ``tokens``.  A node's row is the target's distribution *after*
    that node, also when the node was rejected (conditioned on the rejected prefix).
    """

    #: i4[R] index, in prompt + output, of the committed token the proposal hangs on.
    root: Array
    #: i4[R] number of proposed nodes (0 when a round did not speculate).
    size: Array
    #: i2[R] index into ``Trace.drafters``.
    drafter: Array
    #: i4[M] proposed ids, parents before children.
    tokens: Array
    #: i2[M] parent node within the round; -1 is the root.
    parents: Array
    #: f4[M] drafter's log-probability of each proposal given its parent, at the temperature it drafted with.
    logprobs: Array
    #: u1[M] 1 where the node was accepted.
    accepted: Array
    #: i4[R] token the target drew itself.
    bonus: Array
    #: i4[M + R, K] target's most likely ids, best first.
    top_ids: Array
    #: f4[M + R, K] their log-probabilities at ``Trace.top_temperature``, before top-k and top-p.
    top_logprobs: Array
    #: f4[M + R] probability mass outside the K kept.
    tail: Array


class Features(Record, frozen=True, kw_only=True):
    """The target's hidden states at three layers, concatenated, for consecutive committed positions.

    ``inline``: ``values`` holds them; ``recompute``: the trainer prefills the frozen target; ``store``:
    ``reference`` is an fsspec URL.
    """

    mode: Literal["inline", "recompute", "store"] = "recompute"
    #: First position (index in prompt + output) that ``values`` covers.
    start: int = 0
    #: 0-based ids of the blocks whose outputs were taken (low, middle, high).
    layers: tuple[int, ...] = ()
    #: bf2, f4 or e4m3 [n, 3d].
    values: Array | None = None
    #: f4[n], with e4m3 alone: what each row of ``values`` is multiplied by.  Since schema 1.1.
    scale: Array | None = None
    reference: str | None = None


class Trace(Record, frozen=True, kw_only=True):
    """One request as it was served.  ``trace_id`` is the deduplication key."""

    trace_id: str
    request_id: str
    engine: str
    target: str
    target_revision: str
    tokenizer_hash: str
    #: Versions that proposed in this request, in order of first use; ``Rounds.drafter`` indexes it.
    drafters: tuple[str, ...]
    #: Unix seconds.
    started_at: float
    finished_at: float
    sampling: Sampling
    #: Temperature at which ``top_logprobs`` were taken: the request's, or 1.0 for a greedy request.
    top_temperature: float
    finish_reason: FinishReason
    #: i4[P] and i4[T - P].
    prompt: Array
    output: Array
    rounds: Rounds
    features: Features
    tenant: str = "default"
    domain: str = "default"
    consent: bool = True
    schema_major: int = SCHEMA_MAJOR
    schema_minor: int = SCHEMA_MINOR


class DeadLetter(Record, frozen=True, kw_only=True):
    """A stream item that could not be read, as a value: where it was, why, and its first bytes."""

    offset: int
    reason: str
    head: bytes = b""


class Delivery(Record, frozen=True, kw_only=True):
    """A stream item with its place.  ``offset`` is the item's own; resume from ``offset + 1``."""

    partition: str
    offset: int
    item: Trace | DeadLetter


#: Next offset to read, by partition.  An absent partition means from its start.
Offsets = dict[str, int]


class Manifest(Record, frozen=True, kw_only=True):
    """``manifest.json`` beside a drafter's weights: what it is, what it was trained for and on."""

    #: Name -> sha256 (hex) of the tensor's bytes as stored.
    tensors: dict[str, str]
    target: str
    target_revision: str
    tokenizer_hash: str
    parent: str | None = None
    #: "refreshed": the tokens that it can propose were chosen anew; it begins a lineage.  Else they are its parent's.
    vocabulary: Literal["kept", "refreshed"] = "kept"
    #: Offsets the weights have been trained through.
    offsets: Offsets = {}
    tokens_trained: int = 0
    steps: int = 0
    created_at: float = 0.0


class DrafterVersion(Record, frozen=True, kw_only=True):
    """A registered drafter."""

    version: str
    #: sha256 (hex) over the manifest's tensor hashes: what an engine confirms after a swap.
    checksum: str
    aliases: tuple[str, ...] = ()
    parent: str | None = None
    created_at: float = 0.0
    metrics: dict[str, float] = {}
    tags: dict[str, str] = {}


class SwapRequest(Record, frozen=True, kw_only=True):
    """Ask an engine to draft with the checkpoint in ``path`` (a folder it can read) from its next step on."""

    path: str
    version: str
    checksum: str


class SwapReceipt(Record, frozen=True, kw_only=True):
    """What an engine holds after a swap; ``checksum`` is computed from the tensors it now drafts with."""

    version: str
    checksum: str
    previous: str
    applied_at: float
    #: Seconds the engine's loop was held by the exchange itself.
    stall_s: float


class EngineStatus(Record, frozen=True, kw_only=True):
    """A snapshot of an engine; counters only grow within one start."""

    engine: str
    target: str
    target_revision: str
    tokenizer_hash: str
    context_length: int
    drafter: str
    drafter_checksum: str
    running: int
    waiting: int
    output_tokens: int
    rounds: int
    #: (committed tokens, rounds) by drafter version, over rounds that drafted to the full: what a replay predicts.
    by_drafter: dict[str, tuple[int, int]] = {}
    #: The same by version and stratum of the traffic: "domain/greedy" or "domain/sampled".  Depth is chosen by kind,
    #: so the mix of full rounds is not that of the traffic.
    by_stratum: dict[str, dict[str, tuple[int, int]]] = {}
    #: Requests that had any such round, by drafter version; empty where an engine does not count them.
    requests_by_drafter: dict[str, int] = {}
    #: Measured seconds of a target pass by rows per request (1: a plain step), and of drafting by depth, at the batch
    #: size served most; empty where an engine does not measure them.
    pass_s: dict[int, float] = {}
    draft_s: dict[int, float] = {}
    traces_offered: int = 0
    traces_dropped: int = 0
    capture: bool = True
    #: Parts of an engine that switched themselves off, each with why.
    disabled: dict[str, str] = {}


class ReplayScore(Record, frozen=True, kw_only=True):
    """How one drafter would have served one held-out trace, under the rounds it would have needed."""

    trace_id: str
    domain: str
    temperature: float
    #: Output tokens scored, and the expected verify rounds to commit them: accept length = tokens / rounds.
    tokens: float
    rounds: float


class Decision(Record, frozen=True, kw_only=True):
    """A gate's, controller's or watch's verdict with everything it rests on.  Pure functions return it."""

    action: Literal["promote", "reject", "keep", "rollback", "wait"]
    reason: str
    candidate: str | None = None
    live: str | None = None
    evidence: dict[str, float] = {}
    at: float = 0.0
