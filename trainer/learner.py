"""The learner: everything that a trace can change, as one thing that a checkpoint can hold.

Given its state and the deliveries that follow, what it becomes is determined: no clock, and one generator of
random choices whose state is part of its own.

Ranks (``trainer.ranks``) are one learner.  Each hears of every delivery, so that all draw the same batch, and works on
those traces of it that it holds.
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
from livedraft.contracts.messages import DeadLetter, Delivery, Offsets, Record, Trace
from livedraft.contracts.settings import Trainer as Settings
from livedraft.traces.admission import held_out
from livedraft.traces.arrays import to_numpy
from livedraft.trainer.average import Average
from livedraft.trainer.batch import Batch, pack
from livedraft.trainer.lesson import Lesson, Rejections, lesson
from livedraft.trainer.model import Drafter
from livedraft.trainer.notice import Notice, notice_of
from livedraft.trainer.objective import Loss, Objective, census, loss
from livedraft.trainer.optimizer import Optimizer
from livedraft.trainer.pace import Pace
from livedraft.trainer.prefill import Prefill, is_whole
from livedraft.trainer.ranks import Ranks
from livedraft.trainer.replay import Kept, Replay, ReplayState
from torch import Tensor, nn

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

    learner.hear(source.poll(limit=learner.appetite))
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
        ranks: Ranks | None = None,
    ) -> None:
        """``prefill`` completes traces that came without features; without one they teach nothing."""
        self.ranks = ranks or Ranks()
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
        self.excluded = 0.0
        self._excluded_for = 0
        objective = Objective(
            unroll=settings.unroll,
            decay=settings.decay,
            discard=settings.discard,
            terms=settings.objective_terms,
            importance_cap=settings.importance_cap,
            low_precision=drafter.low_precision,
        )
        self._lecture = self.ranks.parallel(_Lecture(drafter, objective))
        self._optimizer = Optimizer(drafter, settings, self.ranks)
        self._average = Average(drafter, settings.average, self.ranks)
        self.pace = Pace()
        self._accept_length = 1.0
        self._feature_rms = 0.0

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

    def hear(self, deliveries: Sequence[Delivery]) -> int:
        """Admit what came to any rank, to this one ``deliveries``; returns how many.  All of them hear at once."""
        mine = {(d.partition, d.offset): d for d in deliveries}
        told = self.ranks.gather([(place, self._notice(delivery)) for place, delivery in mine.items()])
        everyones = sorted((at for rank in told for at in rank), key=lambda at: at[0])
        for place, notice in everyones:
            self._take(*place, notice, mine.get(place))
        return len(everyones)

    def admit(self, delivery: Delivery) -> str:
        """Take a delivery; returns what became of it ("admitted", or why not), which is also counted."""
        return self._take(delivery.partition, delivery.offset, self._notice(delivery), delivery)

    def _take(self, partition: str, offset: int, notice: Notice, delivery: Delivery | None) -> str:
        self.offsets[partition] = offset + 1
        verdict = self._verdict(notice)
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        if verdict == "admitted":
            self._versions |= dict.fromkeys(notice.drafters)
            held = delivery.item if delivery else notice
            assert not isinstance(held, DeadLetter), "it has a fault"
            self._replay.add(held, self._random)
            self._owed += self._settings.steps_per_trace
        return verdict

    def step(self) -> Step:
        """One optimiser step on a batch from replay.  Call only while ``can_learn``."""
        settings, ranks = self._settings, self.ranks
        fresh_share = None if self.pace.mode == "steady" else 1.0
        kept = self._replay.sample(settings.batch_traces, self._random, fresh_share=fresh_share)
        parts = [self._part(one) for one in kept]  # of all, so that every rank draws alike
        held = {n: one for n, one in enumerate(kept) if isinstance(one, Trace)}
        traces = zip(held, self._whole([*held.values()]), strict=True)
        lessons = [self._lesson(trace, *parts[n]) for n, trace in traces]
        batch = pack(lessons, self.drafter.draft_row, hard_greedy=settings.hard_greedy) if lessons else None
        whole = ranks.sum(census(batch) if batch else torch.zeros(self.depth, 3, dtype=torch.float64))
        self._feature_rms = self._feature_rms or self._root_mean_square(batch)
        self._optimizer.zero_grad()
        part, taught = self._lecture(batch, whole)
        ranks.backward(part)
        found = self._over_ranks(taught, [*held], len(kept))
        if self._optimizer.step(self.steps, self._feature_rms):
            self._average.update(self.pace.since)
            self._accept_length += 0.05 * (found.accept_length - self._accept_length)
        else:  # one batch that overflows must not cost all that was learned
            self.counts["overflown step"] = self.counts.get("overflown step", 0) + 1
        tokens = int(whole[0, 0])
        mass = torch.tensor(batch.excluded * batch.tokens if batch else 0.0, dtype=torch.float64)
        excluded = float(ranks.sum(mass)) / max(tokens, 1)
        self._watch_vocabulary(excluded)
        self._keep_pace(kept[: self._replay.new], found)
        self._owed = max(self._owed - 1, 0.0)
        self.steps += 1
        self.tokens += tokens
        return Step(float(found.total), found.accept_length, tokens, excluded)

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

    def _over_ranks(self, found: Loss, places: list[int], size: int) -> Loss:
        """The sum of the ranks' parts; this one's lessons stand at ``places`` in a batch of ``size``."""
        by_lesson = found.by_lesson.new_zeros(size)
        by_lesson[places] = found.by_lesson
        depth = len(found.overlap)
        parts = torch.cat([found.total.detach()[None], found.divergence, found.overlap, by_lesson])
        total, divergence, overlap, by_lesson = torch.split(self.ranks.sum(parts), [1, depth, depth, size])
        return Loss(total[0], divergence, overlap, by_lesson)

    def _root_mean_square(self, batch: Batch | None) -> float:
        features = batch.forest.features if batch else torch.zeros(0)
        squares, count = self.ranks.sum(torch.stack([features.square().sum(), torch.tensor(float(features.numel()))]))
        return float((squares / count).sqrt())

    def _keep_pace(self, new: Sequence[Kept], found: Loss) -> None:
        drifts = self.pace.drifts
        scores = zip((t.domain for t in new), found.by_lesson.tolist(), strict=False)
        self.pace = self.pace.stepped(found.accept_length, self._settings.rest_gain).heard(scores)
        if self.pace.drifts > drifts:
            _log.info("learning from what is new: %s", self.pace.reason)
            self._replay.turn_over(self._settings.batch_traces, self._random)

    def candidate(self) -> dict[str, np.ndarray]:
        """Copies of what is worth publishing now, by tensor name: the averaged weights."""
        weights = self.drafter.state_dict() | self._average.weights
        return {name: self.ranks.whole(t).detach().cpu().numpy().copy() for name, t in weights.items()}

    def state(self) -> tuple[LearnerState, dict[str, Tensor], list[Trace]]:
        """Everything: the plain part, weights, optimiser moments and averages by name, the traces in replay.

        The traces are those that this rank holds; the rest is the same on all.
        """
        tensors = {f"drafter/{name}": t for name, t in self.drafter.state_dict().items()}
        tensors |= {f"optimizer/{name}": t for name, t in self._optimizer.state().items()}
        tensors |= {f"average/{name}": t for name, t in self._average.weights.items()}
        # Sorted: moments come in the order in which a file gave them, which differs between ranks.
        tensors = {name: self.ranks.whole(tensors[name]) for name in sorted(tensors)}
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
        return plain, tensors, [kept for kept in self._replay if isinstance(kept, Trace)]

    def restore(self, plain: LearnerState, tensors: dict[str, Tensor], traces: dict[str, Trace]) -> None:
        """Become what ``state`` was taken of, whatever the ranks were; of ``traces`` each rank brings its share.

        Of a learner with another draft vocabulary only what it has read and keeps is taken over: its weights are of
        another lineage, and the one that this learner was made for goes on from the drafter that it was given.
        """
        if torch.equal(tensors["drafter/d2t"], self.drafter.d2t):
            weights = _below("drafter/", tensors)
            with torch.no_grad():
                for name, t in self.drafter.state_dict().items():
                    t.copy_(self.ranks.share(weights[name], t))
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
        # Settings may have changed: what cannot be used any more has a fault.
        told = self.ranks.gather([notice_of(trace, self._fault(trace)) for trace in traces.values()])
        notices = {notice.trace_id: notice for rank in told for notice in rank}
        self._replay.restore(plain.replay, {**notices, **traces})
        self._replay.discard(lambda kept: bool(notices[kept.trace_id].fault))
        self.pace = plain.pace
        self._random.setstate((3, plain.random, None))

    def _notice(self, delivery: Delivery) -> Notice:
        trace = delivery.item
        return notice_of(trace, self._fault(trace)) if isinstance(trace, Trace) else Notice(fault="dead letter")

    def _fault(self, trace: Trace) -> str:
        """Why it teaches nothing, whatever came before it."""
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
        return "" if self._can_use(trace) else "no features"

    def _verdict(self, notice: Notice) -> str:
        if notice.fault == "dead letter":
            return notice.fault
        if held_out(notice.request_id, self._held_out):
            return "held out"
        if notice.trace_id in self._known:
            return "duplicate"
        self._known[notice.trace_id] = None
        if len(self._known) > _DEDUPE:
            self._known.popitem(last=False)
        return notice.fault or "admitted"

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

    def _part(self, kept: Kept) -> tuple[int, int]:
        """Where to begin with a trace, and with the roots in it."""
        notice = kept if isinstance(kept, Notice) else notice_of(kept)
        window, every, start = self._settings.window, self._settings.root_every, 0
        if (over := notice.length - 1 - window) > 0:
            # A longer trace shows another part each time; half a window of prompt at most.
            start = self._random.randint(min(max(notice.prompt - window // 2, 0), over), over)
        return start, self._random.randrange(every) if every > 1 else 0

    def _lesson(self, trace: Trace, start: int, skip: int) -> Lesson:
        settings = self._settings
        return lesson(
            trace,
            self.depth,
            start=start,
            window=settings.window,
            stale=self._stale,
            rejections=Rejections(settings.discard_depth, settings.discard_topk) if settings.discard else None,
            every=settings.root_every,
            skip=skip,
        )

    @property
    def _stale(self) -> set[str]:
        versions = list(self._versions)
        return set(versions[: max(len(versions) - self._settings.max_version_lag, 0)])


class _Lecture(nn.Module):
    """Batch in, loss out, as those need it who look after a module's gradients."""

    def __init__(self, drafter: Drafter, objective: Objective) -> None:
        super().__init__()
        self.drafter, self._objective = drafter, objective

    def forward(self, batch: Batch | None, whole: Tensor) -> tuple[Tensor, Loss]:
        """``whole``: as for ``loss``.  Of no batch: zeros."""
        if batch is None:
            nothing = torch.zeros(len(whole))
            found = Loss(total=torch.zeros(()), divergence=nothing, overlap=nothing, by_lesson=torch.zeros(0))
        else:
            found = loss(self.drafter, batch, self._objective, whole)
        return found.total, found


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
