"""Every verify round inside SGLang, on its way to a trace; and the counts that a status tells.

Three places see a request pass.  The forward passes (``_around_prefill``, ``_around_verify``) leave, for the requests
that are recorded, what ``rounds`` lifts off the device.  Where SGLang commits their results, an iteration later when
it overlaps, ``_settle`` notes what was kept of each.  A thread of low priority does the rest.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from livedraft.contracts.errors import SettingsError
from livedraft.contracts.messages import FinishReason, Generation, Sampling, Trace
from livedraft.contracts.ports import TraceSink
from livedraft.contracts.settings import Settings
from livedraft.kernels.features import pack_rows
from livedraft.serving.sglang.budget import Budget
from livedraft.serving.sglang.identity import Drafting, Identity
from livedraft.serving.sglang.proposals import Proposals, Tap, proposed
from livedraft.serving.sglang.recording import Ended, Layout, Recording, Source, Torn, Words, traces
from livedraft.serving.sglang.rounds import Lifted, Span, Verdict, arrived
from livedraft.serving.sglang.surface import Feature, Hook
from livedraft.serving.sglang.tally import Tally
from livedraft.traces.admission import admit
from livedraft.traces.arrays import from_numpy, to_numpy
from livedraft.traces.relay_sink import SCHEME, RelaySink
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

log = logging.getLogger(__name__)

_WORKER = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
_PREFILL = f"{_WORKER}._forward_prefill_batch"
_VERIFY = f"{_WORKER}.verify"
_PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_PREFILLED = f"{_PROCESSOR}.process_batch_result_prefill"
_DECODED = f"{_PROCESSOR}.process_batch_result_decode"
_ABORTED = "sglang.srt.managers.scheduler.Scheduler.send_abort_output"

_NICE = 10
#: Settled passes gather for so many seconds, or until they are so many: whenever an operation of capture's thread ends,
#: the scheduler may have to wait for the interpreter.
_GATHER_S, _TOGETHER = 0.5, 16
#: What the ids of SGLang's requests to itself begin with.
_HEALTH_CHECK = "HEALTH_CHECK"
#: Where SGLang's requests and results carry what is ours.
_OURS = "livedraft"


@dataclass(slots=True)
class Seat:
    """A request as the counts see it, and its recording while there is one."""

    domain: str
    kind: str
    recording: Recording | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """What a forward pass says of itself, with what it left for traces."""

    drafter: str
    #: Steps drafted; None for a prefill.
    steps: int | None
    lifted: Lifted | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """One request's part in a settled pass."""

    recording: Recording
    slot: int
    #: Tokens committed of what the round accepted; 0 for a prefill that goes on.
    committed: int


@dataclass(frozen=True, slots=True)
class _Settled:
    lifted: Lifted | None
    entries: Sequence[_Entry]
    ended: Sequence[Ended]


class Unsuited(Exception):
    """A server whose rounds are not captured."""


class Capture:
    """A part of the plugin (see ``surface``) and its ``Counters``.

    A request is recorded from its first prefill on or not at all: by the rate and tenants of ``settings.traces`` and
    by what its ``custom_params`` say, before anything of it is copied.  Where ``traces.buffer_bytes`` do not hold
    what waits, the youngest recording is given up: the oldest is nearest to its end.
    """

    def __init__(
        self, settings: Settings, drafting: Drafting, *, sink: Callable[[Settings], TraceSink] | None = None
    ) -> None:
        self.feature = Feature("capture")
        self.counting = Feature("counters")
        self.tally = Tally()
        self._settings = settings
        self._drafting = drafting
        self._open_sink = sink or relay_sink
        self._sink: TraceSink | None = None
        self._recording = False
        self._identity: Identity | None = None
        self._layers: tuple[int, ...] | None = None
        self._budget = Budget(settings.traces.buffer_bytes)
        self._open: weakref.WeakSet[Recording] = weakref.WeakSet()
        self._full_depth: int | None = None
        self._offered = 0
        self._lost: Counter[str] = Counter()
        self._queue: queue.SimpleQueue[_Settled | None] = queue.SimpleQueue()
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, name="livedraft-capture", daemon=True)
        self._tap = Tap(self.feature)
        self._proposals = Proposals(self.feature, self._tap, lambda: bool(self._open))
        self.hooks = [
            Hook(_VERIFY, self._around_verify, ("batch",), self.counting),
            Hook(_PREFILLED, self._around_result, ("batch", "result"), self.counting),
            Hook(_DECODED, self._around_result, ("batch", "result"), self.counting),
            Hook(_PREFILL, self._around_prefill, ("batch",), self.feature),
            # 0.5.21 and 0.5.22 have no such place: what ends in the queue there leaves no trace.
            Hook(_ABORTED, self._around_abort, ("abort_req", "req"), self.feature, needed=False),
            *self._tap.hooks,
            *self._proposals.hooks,
        ]
        if not settings.traces.url.startswith(SCHEME):
            self.feature.switch_off(
                f"traces.url is {settings.traces.url!r}, expected {SCHEME}host:port: SGLang's traces go to a relay"
            )

    def start(self, identity: Identity) -> None:
        """See ``surface.Part``.  Requests that began earlier are never recorded."""
        if not (identity.leads and self.feature.on):
            return
        try:
            sink = self._open_sink(self._settings)
        except SettingsError as error:
            self.feature.switch_off(str(error))
            return
        self._identity, self._sink = identity, sink
        self._thread.start()
        self._recording = True

    def close(self) -> None:
        """Make traces of what ended, and send them."""
        if self._recording:
            self._recording = False
            self._queue.put(None)
            self._enough.set()
            self._thread.join()
        if self._sink is not None:
            log.info("livedraft ends: a relay that is there gets the traces that still wait")
            self._sink.close()

    # ---- Counters

    @property
    def output_tokens(self) -> int:
        """Tokens committed."""
        return self.tally.output_tokens

    @property
    def rounds(self) -> int:
        """Verify rounds."""
        return self.tally.rounds

    @property
    def by_drafter(self) -> dict[str, tuple[int, int]]:
        """See ``Tally``."""
        return self.tally.by_drafter

    @property
    def by_stratum(self) -> dict[str, dict[str, tuple[int, int]]]:
        """See ``Tally``."""
        return self.tally.by_stratum

    @property
    def traces_offered(self) -> int:
        """Recordings that ended, one way or the other."""
        return self._offered

    @property
    def traces_dropped(self) -> int:
        """Those of them that were not sent and will not be."""
        return self._lost.total() + (self._sink.dropped if self._sink else 0)

    @property
    def lost(self) -> dict[str, int]:
        """Recordings given up before the sink, by reason: "full", "torn"."""
        return dict(self._lost)

    @property
    def waiting_bytes(self) -> int:
        """What recordings hold, and what is on its way to them."""
        return self._budget.held

    # ---- forward passes

    def _around_prefill(self, original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        reqs = batch.reqs
        if not self._recording or not reqs or not self._suits(worker):
            return original(worker, batch, *args, **kwargs)
        if not [req for req in reqs if self._begins(req)]:
            return original(worker, batch, *args, **kwargs)
        prefixes, extends = list(batch.prefix_lens), list(batch.extend_lens)
        heat = _temperatures(batch.sampling_info)
        starts = [sum(extends[:i]) for i in range(len(extends))]
        width = self._candidates(worker)
        layout = Layout(nodes=1, depth=1, candidates=width)
        wide = self._feature_width(worker)
        rows = self._fitting(reqs, [4 * layout.width + 2 * extend * wide for extend in extends])
        if not rows:
            return original(worker, batch, *args, **kwargs)
        seen: list[tuple[Tensor, Tensor | None, Tensor]] = []

        def look(output: Any) -> None:
            # The target's pass; the drafter's comes after.  Sampling would overwrite these logits.
            if not seen:
                pick = _picker(rows, len(reqs), output.next_token_logits.device)
                logits = pick(output.next_token_logits[: len(reqs)]).clone()
                parts = [output.hidden_states[starts[i] : starts[i] + extends[i], :wide] for i in rows]
                features = parts[0] if len(parts) == 1 else torch.cat(parts)
                seen.append((logits, None if heat is None else pick(heat), features))

        with self._tap.shown(look):
            result = original(worker, batch, *args, **kwargs)
        logits, temperatures, features = seen[0]
        drawn = _picker(rows, len(reqs), features.device)(result.next_token_ids[: len(reqs)])
        verdict = Verdict(logits, temperatures, drawn[:, None], torch.ones_like(drawn), drawn)
        firsts = [sum(extends[i] for i in rows[:slot]) for slot in range(len(rows))]
        spans = [Span(first, extends[i], prefixes[i]) for first, i in zip(firsts, rows, strict=True)]
        self._lift(result, self._lifted(layout, rows, spans, verdict, features), None)
        return result

    def _around_verify(self, original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(worker, batch, *args, **kwargs)
        if not batch.reqs:
            return result
        if self._full_depth is None:
            self._full_depth = int(worker.server_args.speculative_num_steps or 0)
        lifted = None
        if self.feature.on and self._recording:
            try:
                lifted = self._verified(worker, batch, result)
            except Exception as error:  # counting goes on without capture
                self.feature.failed(error)
        self._lift(result, lifted, batch.spec_info.spec_steps)
        return result

    def _verified(self, worker: Any, batch: Any, result: Any) -> Lifted | None:
        verify, count = batch.spec_info, len(batch.reqs)
        chain = self._proposals.take()
        n, tree = verify.draft_token_num, verify.topk > 1
        depth, wide = verify.max_tree_depth if tree else n, self._feature_width(worker)
        layout = Layout(nodes=n, depth=depth, candidates=self._candidates(worker), tree=tree)
        rows = self._fitting(batch.reqs, [4 * layout.width + 2 * depth * wide] * count)
        if not rows:
            return None
        logits, hidden = result.logits_output.next_token_logits, result.logits_output.hidden_states
        pick = _picker(rows, count, logits.device)
        heat = _temperatures(batch.sampling_info)
        tokens = verify.draft_token.view(count, n)
        logprobs = None if chain else proposed(verify, tokens)
        verdict = Verdict(
            logits=pick(logits[: count * n].view(count, n, -1)).flatten(0, 1),
            temperatures=None if heat is None else pick(heat).repeat_interleave(n, 0),
            tokens=pick(tokens),
            accepted=pick(result.accept_lens),
            bonus=pick(result.next_draft_input.bonus_tokens),
            logprobs=None if logprobs is None else pick(logprobs),
            chain=chain and chain.picked(pick),
            path=pick(result.accept_index) if tree else None,
            child=pick(verify.retrieve_next_token) if tree else None,
            sibling=pick(verify.retrieve_next_sibling) if tree else None,
        )
        # The rows of the accepted path come first, SGLang has moved them there.
        features = pick(hidden[: count * n].view(count, n, -1)[:, :depth, :wide]).flatten(0, 1)
        spans = [Span(slot * depth, depth) for slot in range(len(rows))]
        return self._lifted(layout, rows, spans, verdict, features)

    def _lifted(
        self, layout: Layout, rows: Sequence[int], spans: Sequence[Span], verdict: Verdict, features: Tensor
    ) -> Lifted:
        """Where the thread falls behind and logits pile up, they are looked at here."""
        later = verdict.logits.device.type == "cpu" and not self._budget.crowded(verdict.size)
        return Lifted(layout, rows, spans, verdict, features, self._drafting.version, later=later)

    def _lift(self, result: Any, lifted: Lifted | None, steps: int | None) -> None:
        if lifted is not None:
            self._budget.claim(lifted, lifted.size)
        setattr(result, _OURS, Passed(self._drafting.version, steps, lifted))

    def _begins(self, req: Any) -> bool:
        """Whether ``req`` is recorded; its first prefill decides."""
        seat = _seat(req)
        first = req.extend_batch_idx == 1 and not req.retracted_stain and not req.output_ids
        if first and seat.recording is None and self._admits(req):
            params, greedy = req.sampling_params, seat.kind == "greedy"
            seat.recording = Recording(
                request_id=req.rid,
                tenant=_label(req, "tenant"),
                domain=seat.domain,
                # SGLang turns temperature 0 into the best one of temperature 1; to draw among one is the same.
                sampling=Sampling(
                    temperature=0.0 if greedy else params.temperature,
                    top_p=params.top_p,
                    top_k=0 if greedy or params.top_k >= 1 << 30 else params.top_k,
                    seed=params.sampling_seed,
                ),
                prompt_length=len(req.origin_input_ids),
            )
            self._open.add(seat.recording)
        return seat.recording is not None

    def _admits(self, req: Any) -> bool:
        """Admission's rule, and requests that a trace cannot tell: other inputs than tokens, another target."""
        told = _told(req)
        request = Generation(
            request_id=req.rid, prompt=(), tenant=_label(req, "tenant"), traced=told.get("traced", True) is True
        )
        traces = self._settings.traces
        return (
            not req.rid.startswith(_HEALTH_CHECK)
            and req.multimodal_inputs is None
            and req.input_embeds is None
            and req.lora_id is None
            and req.to_finish is None
            and admit(request, opted_out=traces.opted_out, sample_rate=traces.sample_rate).captured
        )

    def _fitting(self, reqs: Sequence[Any], sizes: Sequence[int]) -> list[int]:
        """Rows of the recorded requests, the youngest given up until what they copy, ``sizes`` of each, fits."""
        rows = [i for i, req in enumerate(reqs) if _seat(req).recording is not None]
        while rows and not self._budget.fits(sum(sizes[i] for i in rows)):
            recordings = {i: _seat(reqs[i]).recording for i in rows}
            youngest = max(rows, key=lambda i: r.started_at if (r := recordings[i]) else 0.0)
            self._give_up(_seat(reqs[youngest]), "full")
            rows.remove(youngest)
        return rows

    def _give_up(self, seat: Seat, reason: str) -> None:
        recording, seat.recording = seat.recording, None
        if recording is not None:
            recording.lost = reason
            self._close_recording(recording)
            self._count_lost(reason, f"request {recording.request_id}, with {self._budget.held} bytes waiting")

    def _close_recording(self, recording: Recording) -> None:
        self._open.discard(recording)
        self._offered += 1
        if recording.lost:
            self._budget.release(recording)

    def _count_lost(self, reason: str, detail: str) -> None:
        if not self._lost[reason]:
            log.warning("a trace was dropped, %s: %s (told once)", reason, detail)
        self._lost[reason] += 1

    def _suits(self, worker: Any) -> bool:
        """Whether rounds of this server can be told; looked at once."""
        if self._layers is None:
            try:
                self._layers = feature_layers(worker)
            except Unsuited as problem:
                self.feature.switch_off(str(problem))
        return self._layers is not None

    def _candidates(self, worker: Any) -> int:
        return min(self._settings.engine.capture_topk, int(worker.target_worker.model_config.vocab_size))

    def _feature_width(self, worker: Any) -> int:
        """Of what is taken of them: rows without columns where the trainer computes features again."""
        inline = self._settings.traces.features == "inline"
        return 3 * int(worker.target_worker.model_config.hidden_size) if inline else 0

    # ---- results

    def _around_result(
        self, original: Callable[..., Any], processor: Any, batch: Any, result: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A result of a request that ended or was retracted in the meantime is nobody's."""
        reqs = batch.reqs
        before = [-1 if req.finished() or req.is_retracted else len(req.output_ids) for req in reqs]
        returned = original(processor, batch, result, *args, **kwargs)
        passed: Passed | None = getattr(result, _OURS, None)
        prefill = passed.steps is None if passed else batch.forward_mode.is_extend()
        added = [len(req.output_ids) - n if n >= 0 else 0 for req, n in zip(reqs, before, strict=True)]
        self._count(reqs, before, added, passed, prefill)
        if self.feature.on and self._recording:
            try:
                self._settle(reqs, before, added, passed)
            except Exception as error:  # counting goes on without capture
                self.feature.failed(error)
        return returned

    def _count(
        self, reqs: Sequence[Any], before: Sequence[int], added: Sequence[int], passed: Passed | None, prefill: bool
    ) -> None:
        steps = passed.steps if passed else None
        for req, had, more in zip(reqs, before, added, strict=True):
            if not more:
                continue
            if prefill:
                self.tally.prefilled()
                continue
            committed = more if req.finished_len is None else max(0, req.finished_len - had)
            self.tally.verified(committed)
            # Near its end a request has no room for all that is drafted.
            if passed and steps and steps == self._full_depth and had + steps < req.sampling_params.max_new_tokens:
                seat = _seat(req)
                self.tally.drafted_fully(passed.drafter, seat.domain, seat.kind, committed)

    def _settle(self, reqs: Sequence[Any], before: Sequence[int], added: Sequence[int], passed: Passed | None) -> None:
        lifted = passed.lifted if passed else None
        entries, ended = [], []
        for slot, i in enumerate(lifted.rows if lifted else ()):
            recording = _seat(reqs[i]).recording
            if recording is not None and before[i] >= 0:
                entries.append(_Entry(recording, slot, added[i]))
        for req, had in zip(reqs, before, strict=True):
            if had >= 0 and req.finished() and (seat := _seat(req)).recording is not None:
                ended.append(self._end(seat, req, req.output_ids_through_stop, _reason(req.finished_reason)))
        if entries or ended:
            self._hand_over(_Settled(lifted, entries, ended))

    def _end(self, seat: Seat, req: Any, output: Sequence[int], reason: FinishReason) -> Ended:
        recording, seat.recording = seat.recording, None
        assert recording is not None, "only a recorded request ends here"
        self._close_recording(recording)
        return Ended(recording, req.origin_input_ids, output, reason)

    def _around_abort(
        self, original: Callable[..., Any], scheduler: Any, abort_req: Any, req: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A request that ends where no result would tell: in the queue after a retraction, or between two chunks."""
        result = original(scheduler, abort_req, req, *args, **kwargs)
        if (seat := _seat(req)).recording is not None:
            if req.output_ids:
                failed = (abort_req.finished_reason or {}).get("status_code") is not None
                ended = self._end(seat, req, req.output_ids, "error" if failed else "cancelled")
                self._hand_over(_Settled(None, (), [ended]))
            else:
                recording, seat.recording = seat.recording, None
                self._open.discard(recording)
        return result

    def _hand_over(self, settled: _Settled) -> None:
        self._queue.put(settled)
        if self._queue.qsize() >= _TOGETHER or self._budget.crowded():
            self._enough.set()

    # ---- capture's thread

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        goes_on = True
        while goes_on:
            gathered = [self._queue.get()]
            self._enough.wait(_GATHER_S)
            self._enough.clear()
            gathered += [self._queue.get() for _ in range(self._queue.qsize())]
            goes_on = None not in gathered
            if self.feature.on:
                try:
                    self._write([settled for settled in gathered if settled is not None])
                except Exception as error:
                    self.feature.failed(error)
            gathered.clear()  # before the next ones are waited for

    def _write(self, gathered: Sequence[_Settled]) -> None:
        lifted = [settled.lifted for settled in gathered if settled.lifted is not None]
        left = iter(arrived(lifted))
        recordings = dict[Recording, None]()
        for settled in gathered:
            if settled.lifted is not None:
                self._take(settled.lifted, settled.entries, *next(left))
                recordings |= dict.fromkeys(entry.recording for entry in settled.entries)
        for recording in recordings:
            if not recording.lost:
                self._budget.claim(recording, recording.own())
        for one in lifted:
            self._budget.release(one)
        if ended := [one for settled in gathered for one in settled.ended]:
            self._offer(ended)

    def _take(self, lifted: Lifted, entries: Sequence[_Entry], words: Words, features: NDArray[np.uint16]) -> None:
        accepted = words[:, lifted.layout.at("accepted")][:, 0].tolist()
        for entry in entries:
            recording, span = entry.recording, lifted.spans[entry.slot]
            if recording.lost:
                continue
            whole = accepted[entry.slot]
            committed = min(entry.committed, whole)
            if span.position is None:
                # Rows of a recording follow one another: a round's root is the first position not yet computed.
                position, rows = recording.end, committed
            else:
                position, rows = span.position, span.rows
            recording.computed(position, features[span.first : span.first + rows])
            if committed:
                cut = committed if committed < whole else None
                recording.verified(lifted.layout, words[entry.slot], lifted.drafter, cut)

    def _offer(self, ended: Sequence[Ended]) -> None:
        identity, sink = self._identity, self._sink
        assert identity is not None, "nothing is recorded before"
        assert sink is not None, "nothing is recorded before"
        source = Source(
            identity.engine, identity.target, identity.target_revision, identity.tokenizer_hash, self._layers or ()
        )
        for one, made in zip(ended, traces(ended, source), strict=True):
            if isinstance(made, Torn):
                self._count_lost("torn", f"request {one.recording.request_id}: {made}")
            else:
                sink.offer(_in_eight_bits(made) if self._settings.traces.feature_dtype == "fp8" else made)
            self._budget.release(one.recording)


def _in_eight_bits(trace: Trace) -> Trace:
    """``trace`` with its features, if it has any, as e4m3."""
    values = trace.features.values
    if values is None:
        return trace
    packed, scale = pack_rows(torch.from_numpy(to_numpy(values).view(np.int16).copy()).view(torch.bfloat16))
    bits, factors = from_numpy(packed.view(torch.uint8).numpy(), "e4m3"), from_numpy(scale.numpy(), "f4")
    return replace(trace, features=replace(trace.features, values=bits, scale=factors))


def feature_layers(worker: Any) -> tuple[int, ...]:
    """0-based blocks whose outputs the drafter reads.  Raises Unsuited where a trace could not tell its rounds."""
    args = worker.server_args
    if args.pp_size > 1 or args.disaggregation_mode != "null":
        raise Unsuited("neither pipeline parallelism nor disaggregated prefill is captured")
    model = worker.target_worker.model_runner.model
    body = getattr(getattr(model, "language_model", model), "model", None)
    # SGLang takes what enters a block.
    if len(layers := tuple(int(entered) - 1 for entered in getattr(body, "layers_to_capture", None) or ())) != 3:
        raise Unsuited(f"{args.speculative_algorithm} reads no features of three layers, as an EAGLE-3 drafter does")
    return layers


def relay_sink(settings: Settings) -> TraceSink:
    """Where SGLang's traces go.  Raises SettingsError."""
    traces = settings.traces
    return RelaySink(traces.url, buffer_bytes=traces.buffer_bytes, max_trace_bytes=settings.relay.max_trace_bytes)


def _told(req: Any) -> dict[str, Any]:
    """What a gateway says of a request: ``custom_params={"livedraft": {"tenant", "domain", "traced"}}``."""
    params = req.sampling_params.custom_params
    told = params.get(_OURS) if isinstance(params, dict) else None
    return told if isinstance(told, dict) else {}


def _label(req: Any, name: str) -> str:
    value = _told(req).get(name)
    return value if isinstance(value, str) and value else "default"


def _seat(req: Any) -> Seat:
    seat: Seat | None = getattr(req, _OURS, None)
    if seat is None:
        seat = Seat(_label(req, "domain"), "greedy" if req.sampling_params.top_k == 1 else "sampled")
        setattr(req, _OURS, seat)
    return seat


def _reason(finished: Any) -> FinishReason:
    """SGLang's finish reasons say what they are in JSON; a client that leaves is an abort without a status."""
    told = finished.to_json()
    if told["type"] == "abort":
        return "cancelled" if told.get("status_code") is None else "error"
    return "length" if told["type"] == "length" else "stop"


def _temperatures(sampling: Any) -> Tensor | None:
    """[B, 1] temperatures at which the target's word is taken, 1 for greedy requests; None where all are."""
    if sampling.is_all_greedy:
        return None
    temperatures: Tensor = sampling.temperatures
    return torch.where(sampling.top_ks[:, None] <= 1, 1.0, temperatures)


def _picker(rows: Sequence[int], count: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Takes ``rows`` of a batch of ``count``; all of them without a copy."""
    if len(rows) == count:
        return lambda values: values
    index = torch.tensor(rows, pin_memory=device.type != "cpu").to(device, non_blocking=True)
    return lambda values: values[index]
