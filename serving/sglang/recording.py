"""One request as SGLang served it, and the trace that it makes.  numpy alone: nothing here knows SGLang or a device.

SGLang counts a round's root among its nodes: node 0 of n.  A trace does not: node i here is node i - 1 there.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from livedraft.contracts.messages import Array, Features, FinishReason, Rounds, Sampling, Trace
from livedraft.traces.arrays import from_numpy
from numpy.typing import NDArray

Words = NDArray[np.int32]
Ints = NDArray[np.int64]

#: Words laid open together.
_PORTION_BYTES = 16 << 20


class Torn(Exception):
    """The rounds of a recording do not add up to what was answered: some were missed."""


@dataclass(frozen=True, slots=True)
class Source:
    """What every trace of a server has in common."""

    engine: str
    target: str
    target_revision: str
    tokenizer_hash: str
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one request's part in a round lies in 32-bit words, which is what crosses from the device.

    ``nodes`` n, its root included; ``depth`` the longest path that can be accepted, its root included; K
    ``candidates`` per node.  A chain (and a prefill, a round of its root alone) needs neither path nor links.
    """

    nodes: int
    depth: int
    candidates: int
    tree: bool = False

    @property
    def fields(self) -> tuple[tuple[str, int], ...]:
        """Name and words of each field, in order.  Those from ``logprobs`` on, ids aside, are float32."""
        n, k = self.nodes, self.candidates
        links = (("path", self.depth), ("child", n), ("sibling", n)) if self.tree else ()
        return (
            ("tokens", n),
            ("accepted", 1),
            ("bonus", 1),
            *links,
            ("top_ids", n * k),
            ("logprobs", n - 1),
            ("top_logprobs", n * k),
            ("tail", n),
        )

    def at(self, name: str) -> slice:
        """Where a field lies."""
        return _places(self)[name]

    @property
    def width(self) -> int:
        """Words in all."""
        return int(self.at("tail").stop)


@lru_cache(maxsize=256)
def _places(layout: Layout) -> dict[str, slice]:
    ends = itertools.accumulate(words for _, words in layout.fields)
    return {name: slice(end - words, end) for (name, words), end in zip(layout.fields, ends, strict=True)}


@dataclass(slots=True, eq=False, weakref_slot=True)
class Recording:
    """A request's rounds and features.  The scheduler's thread starts and ends it, capture's thread fills it."""

    request_id: str
    tenant: str
    domain: str
    sampling: Sampling
    prompt_length: int
    started_at: float = field(default_factory=time.time)
    #: Why it was given up; None while it is not.
    lost: str | None = None
    rounds: list[tuple[Layout, Words, str]] = field(default_factory=list)
    features: list[NDArray[np.uint16]] = field(default_factory=list)
    #: Positions that ``features`` cover, from and up to.
    start: int = 0
    end: int = 0
    #: How many of ``rounds`` and ``features``, which it was lent, are its own by now.
    _own: tuple[int, int] = (0, 0)

    def verified(self, layout: Layout, words: Words, drafter: str, keep: int | None = None) -> None:
        """A round: ``words`` [width].  ``keep``: only so many tokens of it were committed, and decoding went on.

        They are lent, as features are: see ``own``.
        """
        if keep is not None:
            _cut(layout, words, keep)
        self.rounds.append((layout, words, drafter))

    def computed(self, position: int, values: NDArray[np.uint16]) -> None:
        """The target computed features [rows, 3H] of consecutive positions from ``position`` on.

        A request that was retracted computes positions again: they are taken once.  One whose prefix was cached
        in the meantime leaves a gap: what lies before it is given up, since a trace holds consecutive positions.
        """
        if self.features and position <= self.end:
            values = values[self.end - position :]
        else:
            self.features, self.start, self.end = [], position, position
            self._own = self._own[0], 0
        if len(values):
            self.features.append(values)
            self.end += len(values)

    def own(self) -> int:
        """Copy what was lent since the last time, so that the rest of its batches may go; returns bytes."""
        rounds, features = self._own
        lent, size = self.rounds[rounds:], 0
        if lent:
            words = np.concatenate([row for _, row, _ in lent])
            ends = itertools.accumulate(layout.width for layout, *_ in lent)
            self.rounds[rounds:] = [
                (layout, words[end - layout.width : end], drafter)
                for (layout, _, drafter), end in zip(lent, ends, strict=True)
            ]
            size += words.nbytes
        if values := self.features[features:]:
            self.features[features:] = [np.concatenate(values)]
            size += self.features[-1].nbytes
        self._own = len(self.rounds), len(self.features)
        return size


def _cut(layout: Layout, words: Words, keep: int) -> None:
    """Accept the first ``keep`` tokens of a round; the last of them becomes its bonus (a grammar's end, say)."""
    if keep >= words[layout.at("accepted")][0]:
        return
    path = words[layout.at("path")] if layout.tree else range(layout.nodes)
    words[layout.at("bonus")] = words[layout.at("tokens")][path[keep]]
    words[layout.at("accepted")] = keep


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that was recorded to its end, and what was answered."""

    recording: Recording
    prompt: Sequence[int]
    output: Sequence[int]
    reason: FinishReason


def traces(ended: Sequence[Ended], source: Source) -> Iterator[Trace | Torn]:
    """The trace of each, or why there is none; rounds of all are laid open together, which costs little more."""
    for together in _portions(ended):
        runs = [
            [
                (layout, [words for _, words, _ in run])
                for layout, run in itertools.groupby(one.recording.rounds, _layout)
            ]
            for one in together
        ]
        rows = defaultdict[Layout, list[list[Words]]](list)
        for layout, words in itertools.chain(*runs):
            rows[layout].append(words)
        opened = {
            layout: _lay_open(layout, np.stack([*itertools.chain(*words)])).split(map(len, words))
            for layout, words in rows.items()
        }
        for one, run in zip(together, runs, strict=True):
            try:
                yield _trace(one, [next(opened[layout]) for layout, _ in run], source)
            except Torn as problem:
                yield problem


def _layout(round_: tuple[Layout, Words, str]) -> Layout:
    return round_[0]


def _portions(ended: Sequence[Ended]) -> Iterator[list[Ended]]:
    """Bounds the memory that it takes to lay rounds open."""
    portion, size = list[Ended](), 0
    for one in ended:
        portion.append(one)
        size += sum(words.nbytes for _, words, _ in one.recording.rounds)
        if size >= _PORTION_BYTES:
            yield portion
            portion, size = [], 0
    yield portion


def _trace(one: Ended, pieces: Sequence[_Piece], source: Source) -> Trace:
    """Raises Torn."""
    recording = one.recording
    before, after = np.asarray(one.prompt, np.int64), np.asarray(one.output, np.int64)
    known = len(before) + len(after) - 1
    if not pieces:
        raise Torn("no round was seen")
    committed = np.concatenate([p.committed for p in pieces])
    lengths = np.concatenate([p.lengths for p in pieces])
    roots = len(before) - 1 + np.cumsum(lengths) - lengths
    if len(before) != recording.prompt_length or not np.array_equal(committed[: len(after)], after):
        raise Torn("its rounds did not commit its output")
    if recording.end < known or recording.start >= known:
        raise Torn(f"features of {recording.start}..{recording.end - 1}, expected up to {known - 1}")
    versions = [drafter for *_, drafter in recording.rounds]
    drafters = tuple(dict.fromkeys(versions))
    return Trace(
        trace_id=f"{source.engine}/{recording.request_id}",
        request_id=recording.request_id,
        engine=source.engine,
        target=source.target,
        target_revision=source.target_revision,
        tokenizer_hash=source.tokenizer_hash,
        drafters=drafters,
        started_at=recording.started_at,
        finished_at=time.time(),
        sampling=recording.sampling,
        top_temperature=recording.sampling.temperature or 1.0,
        finish_reason=one.reason,
        prompt=from_numpy(before, "i4"),
        output=from_numpy(after, "i4"),
        rounds=Rounds(
            root=from_numpy(roots, "i4"),
            size=_joined(pieces, "size", "i4"),
            drafter=from_numpy(np.array([drafters.index(version) for version in versions], np.int16), "i2"),
            tokens=_joined(pieces, "tokens", "i4"),
            parents=_joined(pieces, "parents", "i2"),
            logprobs=_joined(pieces, "logprobs", "f4"),
            accepted=_joined(pieces, "accepted", "u1"),
            bonus=_joined(pieces, "bonus", "i4"),
            top_ids=_joined(pieces, "top_ids", "i4"),
            top_logprobs=_joined(pieces, "top_logprobs", "f4"),
            tail=_joined(pieces, "tail", "f4"),
        ),
        features=_features(recording, source, known),
        tenant=recording.tenant,
        domain=recording.domain,
    )


def _features(recording: Recording, source: Source, known: int) -> Features:
    values = np.concatenate(recording.features)
    if not values.shape[1]:
        return Features(mode="recompute", layers=source.layers)
    return Features(
        mode="inline",
        start=recording.start,
        layers=source.layers,
        # A last round cut short by a stop leaves rows of tokens that were never committed.
        values=from_numpy(values[: known - recording.start], "bf2"),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """R rounds of one layout as a trace has them; M nodes, roots not counted."""

    lengths: Ints  # [R] tokens that each committed
    committed: Ints  # [sum of lengths]
    size: Words  # [R]
    bonus: Words  # [R]
    tokens: Words  # [M]
    parents: NDArray[np.int16]  # [M]
    logprobs: NDArray[np.float32]  # [M]
    accepted: NDArray[np.uint8]  # [M]
    top_ids: Words  # [M + R, K]
    top_logprobs: NDArray[np.float32]  # [M + R, K]
    tail: NDArray[np.float32]  # [M + R]

    def split(self, counts: Iterable[int]) -> Iterator[_Piece]:
        """So many rounds, as many after them as the next says, and so on."""
        nodes, tokens = ([0, *np.cumsum(values).tolist()] for values in (self.size, self.lengths))
        start = 0
        for count in counts:
            end = start + count
            rounds, drafted = slice(start, end), slice(nodes[start], nodes[end])
            with_roots = slice(nodes[start] + start, nodes[end] + end)
            yield _Piece(
                lengths=self.lengths[rounds],
                committed=self.committed[tokens[start] : tokens[end]],
                size=self.size[rounds],
                bonus=self.bonus[rounds],
                tokens=self.tokens[drafted],
                parents=self.parents[drafted],
                logprobs=self.logprobs[drafted],
                accepted=self.accepted[drafted],
                top_ids=self.top_ids[with_roots],
                top_logprobs=self.top_logprobs[with_roots],
                tail=self.tail[with_roots],
            )
            start = end


def _lay_open(layout: Layout, words: Words) -> _Piece:
    """words: [R, width]."""
    n, count = layout.nodes, len(words)

    def ints(name: str) -> Words:
        return words[:, layout.at(name)]

    def floats(name: str) -> NDArray[np.float32]:
        return np.ascontiguousarray(ints(name)).view(np.float32)

    tokens, bonus = ints("tokens"), ints("bonus")[:, 0]
    lengths = ints("accepted")[:, 0].astype(np.int64)
    if layout.tree:
        path = ints("path").astype(np.int64)
        parents = parents_of(ints("child"), ints("sibling"))
    else:
        path = np.broadcast_to(np.arange(n), (count, n))
        parents = np.broadcast_to(np.arange(n) - 1, (count, n))
    on_path = np.arange(path.shape[1]) < lengths[:, None]
    rows, steps = on_path.nonzero()
    accepted = np.zeros((count, n), np.uint8)
    accepted[rows, path[rows, steps]] = 1
    # What step k committed is the node after it on the path; the last step's is the bonus.
    ends = steps + 1 == lengths[rows]
    after = path[rows, np.where(ends, 0, np.minimum(steps + 1, path.shape[1] - 1))]
    committed = np.where(ends, bonus[rows], tokens[rows, after]).astype(np.int64)
    kept = reachable(parents)
    drafted = kept[:, 1:]
    # Nodes are numbered anew without their root, and without those that no path leads to.
    number = np.cumsum(kept, 1) - 2
    return _Piece(
        lengths=lengths,
        committed=committed,
        size=drafted.sum(1, dtype=np.int32),
        bonus=bonus,
        tokens=tokens[:, 1:][drafted],
        parents=np.take_along_axis(number, np.maximum(parents, 0), 1)[:, 1:][drafted].astype(np.int16),
        logprobs=floats("logprobs")[drafted],
        accepted=accepted[:, 1:][drafted],
        top_ids=ints("top_ids").reshape(count, n, -1)[kept],
        top_logprobs=floats("top_logprobs").reshape(count, n, -1)[kept],
        tail=floats("tail")[kept],
    )


def parents_of(child: NDArray[Any], sibling: NDArray[Any]) -> Ints:
    """[R, n] parent of each node, -1 of a root and of a node without one, from first-child and next-sibling links.

    Links lead to later nodes only; -1 is none.
    """
    count, n = child.shape
    parents = np.full((count, n), -1, np.int64)
    for node in range(n):
        for links, parent in ((child, np.full(count, node)), (sibling, parents[:, node])):
            has = links[:, node] > node
            parents[has, links[has, node]] = parent[has]
    return parents


def reachable(parents: Ints) -> NDArray[np.bool_]:
    """[R, n] whether a node hangs on the root: where probabilities tie, SGLang may pick a child without its parent."""
    kept = np.zeros(parents.shape, np.bool_)
    kept[:, 0] = True
    for node in range(1, parents.shape[1]):
        parent = parents[:, node]
        kept[:, node] = (parent >= 0) & kept[np.arange(len(kept)), np.maximum(parent, 0)]
    return kept


def _joined(pieces: Sequence[_Piece], name: str, dtype: Any) -> Array:
    return from_numpy(np.concatenate([getattr(piece, name) for piece in pieces]), dtype)
