"""What a forward pass leaves for traces: computed where its logits are, copied to the host without waiting.

On an accelerator everything here is queued on the stream of the forward pass, behind it: log-probabilities of the K
best and their tail are computed there, so that nothing of the vocabulary's size is copied, and two copies go into
pinned memory, with an event behind them.  Nobody waits for it but the thread that makes traces.

On a CPU nothing is queued: whoever computes the K best holds up the next batch.  There the logits are kept as they
are, and that thread computes them, as long as there is room: those of several passes in one go, because whenever an
operation of its ends, the thread that schedules may have to wait for the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from livedraft.serving.sglang.proposals import Chain, chained
from livedraft.serving.sglang.recording import Layout, Words
from numpy.typing import NDArray
from torch import Tensor

#: Logits looked at together: bounds the memory that their copies need (64 MiB).
_ELEMENTS = 1 << 24
#: Logits of several passes that are laid together first (16 MiB).
_TOGETHER = 1 << 22
#: Values in a column of ``largest``.
_COLUMN = 16


@dataclass(frozen=True, slots=True)
class Best:
    """The target's word on N nodes."""

    ids: Tensor  # [N, K] int64, best first
    logprobs: Tensor  # [N, K]
    tail: Tensor  # [N] probability outside


def best(logits: Tensor, temperatures: Tensor | None, candidates: int, *, elements: int = _ELEMENTS) -> Best:
    """logits [N, V]; temperatures [N, 1], None for 1; ``elements`` of the logits are looked at together."""
    pieces = []
    for at in range(0, len(logits), step := max(1, elements // logits.shape[1])):
        scaled = logits[at : at + step].float()
        if temperatures is not None:
            scaled = scaled / temperatures[at : at + step]
        values, ids = largest(scaled, candidates)
        logprobs = values - scaled.logsumexp(-1, keepdim=True)
        pieces.append((ids, logprobs, (1 - logprobs.exp().sum(-1)).clamp_(min=0)))
    if len(pieces) == 1:
        return Best(*pieces[0])
    return Best(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``values.topk(k)``, of [N, V] rows; on a CPU in half the time at V = 4096, in a fifteenth at 131072.

    The k largest lie in the k columns with the largest maxima, of V / 16 columns that hold every (V / 16)-th each.
    """
    count, size = values.shape
    columns = size // _COLUMN
    if size % _COLUMN or columns < 2 * k:
        top = values.topk(k)
        return top.values, top.indices
    grid = values.reshape(count, _COLUMN, columns)
    chosen = grid.amax(1).topk(k, sorted=False).indices
    few = grid.gather(2, chosen[:, None, :].expand(-1, _COLUMN, -1)).flatten(1)
    top = few.topk(k)
    return top.values, top.indices // k * columns + chosen.gather(1, top.indices % k)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pass decided about B requests of n nodes each."""

    logits: Tensor  # [B * n, V] of the target
    temperatures: Tensor | None  # [B * n, 1]; None for 1
    tokens: Tensor  # [B, n]
    accepted: Tensor  # [B]
    bonus: Tensor  # [B]
    logprobs: Tensor | None = None  # [B, n - 1] of the drafter
    chain: Chain | None = None  # where they are still to be computed
    path: Tensor | None = None  # [B, depth] indices into all B * n nodes
    child: Tensor | None = None  # [B, n] first child
    sibling: Tensor | None = None  # [B, n] next sibling

    @property
    def size(self) -> int:
        """Bytes of the logits, beside which the rest is nothing."""
        return self.logits.nbytes + (self.chain.size if self.chain else 0)

    def kept(self) -> Verdict:
        """For later: copies of what SGLang may go on with; logits and temperatures end with the pass."""

        def copy(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.clone()

        return replace(
            self,
            tokens=self.tokens.clone(),
            accepted=self.accepted.clone(),
            bonus=self.bonus.clone(),
            logprobs=copy(self.logprobs),
            chain=self.chain and replace(self.chain, first=self.chain.first.clone()),
            path=copy(self.path),
            child=copy(self.child),
            sibling=copy(self.sibling),
        )

    @property
    def parts(self) -> tuple[bool, ...]:
        """Which of those there are that may be missing."""
        return tuple(part is not None for part in (self.temperatures, self.logprobs, self.chain, self.path))

    def packed(self, layout: Layout) -> Tensor:
        """int32 [B, width] as ``layout`` says."""
        word = best(self.logits, self.temperatures, layout.candidates)
        count, n = len(self.tokens), layout.nodes
        logprobs = self.chain.logprobs() if self.chain else self.logprobs
        fields: dict[str, Tensor] = {
            "tokens": self.tokens,
            "accepted": self.accepted[:, None],
            "bonus": self.bonus[:, None],
            "top_ids": word.ids.view(count, -1),
            "logprobs": word.tail.new_zeros(count, 0) if logprobs is None else logprobs,
            "top_logprobs": word.logprobs.view(count, -1),
            "tail": word.tail.view(count, -1),
        }
        if self.path is not None and self.child is not None and self.sibling is not None:
            # Past the accepted path it says -1; those places are never read.
            fields |= {"path": self.path % n, "child": self.child, "sibling": self.sibling}
        words = torch.cat([_words(fields[name]) for name, _ in layout.fields], 1)
        if words.shape[1] != layout.width:
            raise ValueError(f"a round's tensors make {words.shape[1]} words, expected the {layout.width} of {layout}")
        return words


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict on all their requests; they are of one shape and have the same parts."""
    first = verdicts[0]
    if len(verdicts) == 1:
        return first

    def one(part: Callable[[Verdict], Tensor | None]) -> Tensor | None:
        found = [values for verdict in verdicts if (values := part(verdict)) is not None]
        return torch.cat(found) if found else None

    return Verdict(
        logits=torch.cat([v.logits for v in verdicts]),
        temperatures=one(lambda v: v.temperatures),
        tokens=torch.cat([v.tokens for v in verdicts]),
        accepted=torch.cat([v.accepted for v in verdicts]),
        bonus=torch.cat([v.bonus for v in verdicts]),
        logprobs=one(lambda v: v.logprobs),
        chain=chained([v.chain for v in verdicts if v.chain]),
        path=one(lambda v: v.path),
        child=one(lambda v: v.child),
        sibling=one(lambda v: v.sibling),
    )


def _words(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.int32) if values.is_floating_point() else values.int()


class Host:
    """A tensor on its way to host memory: complete once ``arrived`` returns."""

    __slots__ = ("_event", "_tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: Any = None
        if tensors[0].device.type == "cpu":
            self._tensors = list(tensors)
            return
        self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for there, here in zip(self._tensors, tensors, strict=True):
            there.copy_(here, non_blocking=True)
        # Blocking: the thread that waits for it sleeps.
        self._event = torch.get_device_module(tensors[0].device).Event(blocking=True)
        self._event.record()

    def arrived(self) -> list[Tensor]:
        """The tensors; waits for them.  Not for the thread that schedules."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors


@dataclass(frozen=True, slots=True)
class Span:
    """One request's features among those of a pass."""

    first: int
    rows: int
    #: Position of the first; None: the round's root, and as many rows are good as tokens were accepted.
    position: int | None = None


class Lifted:
    """What a pass left of the requests that are recorded: slot j is that of row ``rows[j]`` of its batch.

    ``later``: leave the K best of a verdict in host memory to whoever asks for what has ``arrived``.
    """

    def __init__(
        self,
        layout: Layout,
        rows: Sequence[int],
        spans: Sequence[Span],
        verdict: Verdict,
        features: Tensor,
        drafter: str,
        *,
        later: bool = False,
    ) -> None:
        self.layout = layout
        self.rows = rows
        self.spans = spans
        self.drafter = drafter
        #: Bytes on the host.
        self.size = (verdict.size if later else 4 * len(rows) * layout.width) + 2 * features.numel()
        #: What is left to do.
        self.verdict = verdict.kept() if later else None
        self.host = Host([features.bfloat16().view(torch.int16), *([] if later else [verdict.packed(layout)])])


def arrived(lifted: Sequence[Lifted], elements: int = _TOGETHER) -> list[tuple[Words, NDArray[np.uint16]]]:
    """Of each the words [B, width] and the bits of the features [rows, 3H]; waits for them, or computes them.

    Of several, ``elements`` of their logits are laid together to be looked at in one go.
    """
    words = dict[int, Words]()
    for alike in _alike(lifted, elements):
        together = joined([one.verdict for one in alike if one.verdict is not None]).packed(alike[0].layout).numpy()
        first = 0
        for one in alike:
            words[id(one)] = together[first : (first := first + len(one.rows))]
    found = []
    for one in lifted:
        features, *packed = one.host.arrived()
        found.append((packed[0].numpy() if packed else words[id(one)], features.numpy().view(np.uint16)))
    return found


def _alike(lifted: Sequence[Lifted], elements: int) -> Iterator[list[Lifted]]:
    """Those that left a verdict, in groups that are computed in one go."""
    groups = dict[tuple[Layout, tuple[bool, ...]], list[Lifted]]()
    for one in lifted:
        if one.verdict is None:
            continue
        group = groups.setdefault((one.layout, one.verdict.parts), [])
        if group and sum(o.verdict.logits.numel() for o in (*group, one) if o.verdict) > elements:
            yield group[:]
            group.clear()
        group.append(one)
    yield from groups.values()
