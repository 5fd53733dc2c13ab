"""The learner: everything that a trace can change, as one thing that a checkpoint can hold.

Given its state and the deliveries that follow, what it becomes is determined: no clock, and one generator of
random choices whose state is part of its own.
"""

from __future__ import annotations

import logging
import math
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from livedraft.contracts.messages import Delivery, Offsets, Record, Trace
from livedraft.contracts.settings import Trainer as Settings
from livedraft.traces.admission import held_out
from livedraft.traces.arrays import to_numpy
from livedraft.trainer.average import Average
from livedraft.trainer.batch import pack
from livedraft.trainer.lesson import Lesson, Rejections, lesson
from livedraft.trainer.model import Drafter
from livedraft.trainer.objective import Loss, Objective, loss
from livedraft.trainer.optimizer import Optimizer
from livedraft.trainer.pace import Pace
from livedraft.trainer.prefill import Prefill, is_whole
from livedraft.trainer.replay import Replay, ReplayState
from torch import Tensor

_log = logging.getLogger(__name__)

#: Trace ids remembered for deduplication: at-least-once delivery repeats what is recent.
_DEDUPE = 1 << 16


class TargetId(Record, frozen=True, kw_only=True):
    """The target that traces must come from and drafters are made for."""

    target: str
    target_revision: str
    tokenizer_hash: str


class LearnerState(Record, frozen=True, kw_only=True):
    """A learner without its tensors and traces."""

    offsets: Offsets
    steps: int
    tokens: int
    owed: float
    #: Running mean over steps; root mean square of the first batch's features.
    accept_length: float
    feature_rms: float
    #: Running mean of ``Step.excluded``, and for how many steps it has been above the limit.
    excluded: float = 0.0
    excluded_for: int = 0
    #: Deliveries by what became of them.
    counts: dict[str, int]
    known: tuple[str, ...]
    #: Drafter versions in the order in which traces first named them.
    versions: tuple[str, ...]
    replay: ReplayState
    pace: Pace = Pace()
    #: Python's Mersenne Twister.
    random: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What one optimiser step measured."""

    loss: float
    #: Of the batch, from the overlap of drafter and target at each depth.
    accept_length: float
    tokens: int
    #: Mean probability of the target on tokens that the drafter cannot propose.
    excluded: float


class Learner:
    """Admits deliveries, learns from them, knows how far it has read.

    for delivery in source.poll(limit=learner.appetite):
        learner.admit(delivery)
    while learner.can_learn:
        learner.step()
    """

    def __init__(
        self,
        drafter: Drafter,
        target: TargetId,
        settings: Settings,
        *,
        held_out: float = 0.0,
        layers: tuple[int, ...] | None = None,
        prefill: Prefill | None = None,
    ) -> None:
        """``prefill`` completes traces that came without features; without one they teach nothing."""
        self.drafter = drafter
        self.target = target
        self.offsets: Offsets = {}
        self.steps = 0
        self.tokens = 0
        self.counts: dict[str, int] = {}
        self._settings = settings
        self._held_out = held_out
        self._layers = layers
        self._prefill = prefill
        self._owed = 0.0
        self._known: OrderedDict[str, None] = OrderedDict()
        self._versions: dict[str, None] = {}
        self._random = random.Random(settings.seed)
        self._replay = Replay(
            capacity=settings.replay_traces,
            max_uses=settings.max_uses,
            fresh_share=settings.fresh_share,
            rehearse_share=settings.rehearse_share,
        )
        drafter.low_precision = low_precision(settings)
        drafter.lm_head.weight.requires_grad_(settings.head == "trained")
        self._optimizer = Optimizer(drafter, settings)
        self._average = Average(drafter, settings.average)
        self.pace = Pace()
        self._accept_length = 1.0
        self._feature_rms = 0.0
        self.excluded = 0.0
        self._excluded_for = 0
        self._objective = Objective(
            unroll=settings.unroll,
            decay=settings.decay,
            discard=settings.discard,
            terms=settings.objective_terms,
            importance_cap=settings.importance_cap,
            low_precision=drafter.low_precision,
        )

    @property
    def appetite(self) -> int:
        """Deliveries wanted now: in lockstep one at a time, and none while steps are owed for the last."""
        if not self._settings.steps_per_trace:
            return 256
        return 0 if self.can_learn else 1

    @property
    def can_learn(self) -> bool:
        """Whether there is a batch that has not been used up; at rest, one of new traces."""
        lockstep = bool(self._settings.steps_per_trace)
        resting = self.pace.mode == "resting" and not lockstep
        paid = not lockstep or self._owed >= 1
        return paid and self._replay.can_sample(self._settings.batch_traces, new=resting)

    @property
    def depth(self) -> int:
        """Steps unrolled now: one more than chains get far, so that early on no time goes into steps seldom reached."""
        return min(self._settings.unroll, 1 + math.ceil(self._accept_length))

    def admit(self, delivery: Delivery) -> str:
        """Take a delivery; returns what became of it ("admitted", or why not), which is also counted."""
        self.offsets[delivery.partition] = delivery.offset + 1
        verdict = self._verdict(delivery)
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        if verdict == "admitted" and isinstance(delivery.item, Trace):
            self._replay.add(delivery.item, self._random)
            self._owed += self._settings.steps_per_trace
        return verdict

    def step(self) -> Step:
        """One optimiser step on a batch from replay.  Call only while ``can_learn``."""
        settings = self._settings
        fresh_share = None if self.pace.mode == "steady" else 1.0
        traces = self._whole(self._replay.sample(settings.batch_traces, self._random, fresh_share=fresh_share))
        batch = pack(
            [self._lesson(trace) for trace in traces], self.drafter.draft_row, hard_greedy=settings.hard_greedy
        )
        found = loss(self.drafter, batch, self._objective)
        self._optimizer.zero_grad()
        torch.autograd.backward(found.total)
        self._feature_rms = self._feature_rms or float(batch.forest.features.square().mean().sqrt())
        if self._optimizer.step(self.steps, self._feature_rms):
            self._average.update(self.steps)
            self._accept_length += 0.05 * (found.accept_length - self._accept_length)
        else:  # one batch that overflows must not cost all that was learned
            self.counts["overflown step"] = self.counts.get("overflown step", 0) + 1
        self._watch_vocabulary(batch.excluded)
        self._keep_pace(traces[: self._replay.new], found)
        self._owed = max(self._owed - 1, 0.0)
        self.steps += 1
        self.tokens += batch.tokens
        return Step(float(found.total.detach()), found.accept_length, batch.tokens, batch.excluded)

    def _watch_vocabulary(self, excluded: float) -> None:
        self.excluded += 0.02 * (excluded - self.excluded)
        self._excluded_for = self._excluded_for + 1 if self.excluded > self._settings.excluded_limit else 0
        if self._excluded_for == self._settings.excluded_steps:
            _log.warning(
                "%.1f %% of what the target says are tokens that this drafter cannot propose, for %d steps:"
                " `livedraft drafts refresh-vocabulary` chooses them anew",
                100 * self.excluded,
                self._excluded_for,
            )

    def _keep_pace(self, new: Sequence[Trace], found: Loss) -> None:
        drifts = self.pace.drifts
        scores = zip((t.domain for t in new), found.by_lesson.tolist(), strict=False)
        self.pace = self.pace.stepped(found.accept_length, self._settings.rest_gain).heard(scores)
        if self.pace.drifts > drifts:
            _log.info("learning from what is new: %s", self.pace.reason)
            self._replay.turn_over(self._settings.batch_traces, self._random)

    def candidate(self) -> dict[str, np.ndarray]:
        """Copies of what is worth publishing now, by tensor name: the averaged weights."""
        arrays = self.drafter.to_arrays()
        return arrays | {name: mean.numpy().copy() for name, mean in self._average.weights.items()}

    def state(self) -> tuple[LearnerState, dict[str, Tensor], list[Trace]]:
        """Everything: the plain part, weights, optimiser moments and averages by name, the traces in replay."""
        tensors = {f"drafter/{name}": t for name, t in self.drafter.state_dict().items()}
        tensors |= {f"optimizer/{name}": t for name, t in self._optimizer.state().items()}
        tensors |= {f"average/{name}": t for name, t in self._average.weights.items()}
        plain = LearnerState(
            offsets=dict(self.offsets),
            steps=self.steps,
            tokens=self.tokens,
            owed=self._owed,
            accept_length=self._accept_length,
            feature_rms=self._feature_rms,
            excluded=self.excluded,
            excluded_for=self._excluded_for,
            counts=dict(self.counts),
            known=tuple(self._known),
            versions=tuple(self._versions),
            replay=self._replay.state(),
            pace=self.pace,
            random=self._random.getstate()[1],
        )
        return plain, tensors, list(self._replay)

    def restore(self, plain: LearnerState, tensors: dict[str, Tensor], traces: dict[str, Trace]) -> None:
        """Become what ``state`` was taken of.

        Of a learner with another draft vocabulary only what it has read and keeps is taken over: its weights are of
        another lineage, and the one that this learner was made for goes on from the drafter that it was given.
        """
        if torch.equal(tensors["drafter/d2t"], self.drafter.d2t):
            self.drafter.load_state_dict(_below("drafter/", tensors))
            self._optimizer.restore(_below("optimizer/", tensors))
            self._average.restore(_below("average/", tensors))
            self.excluded, self._excluded_for = plain.excluded, plain.excluded_for
        else:
            _log.info("the draft vocabulary is another one now: going on from the live drafter's weights")
        self._accept_length, self._feature_rms = plain.accept_length, plain.feature_rms
        self.offsets = dict(plain.offsets)
        self.steps, self.tokens, self._owed = plain.steps, plain.tokens, plain.owed
        self.counts = dict(plain.counts)
        self._known = OrderedDict.fromkeys(plain.known)
        self._versions = dict.fromkeys(plain.versions)
        self._replay.restore(plain.replay, traces)
        self._replay.discard(lambda trace: not self._can_use(trace))  # settings may have changed
        self.pace = plain.pace
        self._random.setstate((3, plain.random, None))

    def _verdict(self, delivery: Delivery) -> str:
        trace = delivery.item
        if not isinstance(trace, Trace):
            return "dead letter"
        if held_out(trace.request_id, self._held_out):
            return "held out"
        if trace.trace_id in self._known:
            return "duplicate"
        self._known[trace.trace_id] = None
        if len(self._known) > _DEDUPE:
            self._known.popitem(last=False)
        if not trace.consent:
            return "no consent"
        if self.target != TargetId(
            target=trace.target, target_revision=trace.target_revision, tokenizer_hash=trace.tokenizer_hash
        ):
            return "other target"
        if not trace.prompt.shape[0] or trace.output.shape[0] < 2:
            return "nothing to learn"
        layers = trace.features.layers
        if self._layers is not None and layers != self._layers and (layers or trace.features.values):
            return "other features"
        if not self._knows_tokens(trace):
            return "unknown token"
        if not self._can_use(trace):
            return "no features"
        self._versions |= dict.fromkeys(trace.drafters)
        return "admitted"

    def _can_use(self, trace: Trace) -> bool:
        return self._is_whole(trace) or (self._prefill is not None and self._prefill.can_fill(trace))

    def _is_whole(self, trace: Trace) -> bool:
        return is_whole(trace, 3 * self.drafter.config.hidden_size)

    def _whole(self, traces: list[Trace]) -> list[Trace]:
        """``traces`` with what they lack, which replay keeps: each is prefilled once, and only if it is drawn."""
        lacking = {trace.trace_id: trace for trace in traces if not self._is_whole(trace)}
        if not lacking:
            return traces
        assert self._prefill is not None, "nothing that lacks features is admitted without it"
        filled = {trace.trace_id: trace for trace in self._prefill.fill([*lacking.values()])}
        self._replay.exchange(filled)
        return [filled.get(trace.trace_id, trace) for trace in traces]

    def _knows_tokens(self, trace: Trace) -> bool:
        rounds = trace.rounds
        ids = (to_numpy(a) for a in (trace.prompt, trace.output, rounds.tokens, rounds.top_ids))
        return all(int(a.max(initial=0)) < self.drafter.config.vocab_size for a in ids)

    def _lesson(self, trace: Trace) -> Lesson:
        settings = self._settings
        length = trace.prompt.shape[0] + trace.output.shape[0]
        start = 0
        if (over := length - 1 - settings.window) > 0:
            # A longer trace shows another part each time; half a window of prompt at most.
            start = self._random.randint(min(max(trace.prompt.shape[0] - settings.window // 2, 0), over), over)
        return lesson(
            trace,
            self.depth,
            start=start,
            window=settings.window,
            stale=self._stale,
            rejections=Rejections(settings.discard_depth, settings.discard_topk) if settings.discard else None,
            every=settings.root_every,
            skip=self._random.randrange(settings.root_every) if settings.root_every > 1 else 0,
        )

    @property
    def _stale(self) -> set[str]:
        versions = list(self._versions)
        return set(versions[: max(len(versions) - self._settings.max_version_lag, 0)])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def low_precision(settings: Settings) -> bool:
    """Whether ``settings.precision`` comes to bfloat16 on this processor."""
    return settings.precision == "bfloat16" or (settings.precision == "auto" and _fast_bfloat16())


def _fast_bfloat16() -> bool:
    """Whether bfloat16 products are faster here than float32 ones: with tiles (AMX).

    With AVX-512's dot products alone torch's are slower, measured at these sizes: a step took 1.6 times as long.
    """
    return bool(torch.cpu._is_amx_tile_supported())
