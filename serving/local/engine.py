"""The embedded engine: continuous batching, speculation, capture and drafter swaps in one thread's loop."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from livedraft.contracts.errors import BadRequest, Overloaded, PromptTooLong, SwapFailed
from livedraft.contracts.messages import (
    Delta,
    EngineStatus,
    FinishReason,
    Generation,
    SwapReceipt,
    SwapRequest,
    TokenLogprob,
)
from livedraft.contracts.ports import TraceSink
from livedraft.contracts.settings import Engine as EngineSettings
from livedraft.kernels.sampling import distribution
from livedraft.kernels.verify import verify_chain, verify_greedy, verify_tree
from livedraft.serving.local import place
from livedraft.serving.local.capture import Capture, FeatureMode, Origin, Recording
from livedraft.serving.local.depth import DepthControl
from livedraft.serving.local.drafter import Drafter, DrafterWeights
from livedraft.serving.local.drafter import load as load_drafter
from livedraft.serving.local.propose import EMPTY, Proposal, propose_chains, propose_tree, tree_layout
from livedraft.serving.local.target import Target
from livedraft.serving.local.text import Text, TextStream
from torch import Tensor

NAME = "local"
#: Prompt tokens in one pass, and between two rounds of those whose answers flow: bounds what a long prompt delays
#: others by.  Fewer would read the weights more often for the same prompt.
_PREFILL_ROWS = 64
#: Committed positions the drafter may be behind before it reads them on its own rather than with the batch.
_BEHIND = 16
#: Positions that it reads so in one round at most.  Where drafting did not pay all requests are far behind, and the
#: first round that drafts again, as after a swap, would keep every token waiting while it reads them all.
_CATCH_UP_ROWS = 128
#: Strata counted apart for each drafter: clients choose the domains' names.
_STRATA = 64


@dataclass(slots=True, eq=False)
class _Running:
    """A request in a slot.  Its slot is its index in ``LocalEngine._running``."""

    request: Generation
    emit: Callable[[Delta], None]
    text: TextStream
    rng: random.Random
    recording: Recording | None
    tokens: list[int]
    #: Features the drafter has not read yet, and the position of the first.
    unread: list[Tensor] = field(default_factory=list)
    unread_from: int = 0
    rounds: int = 0
    drafter: str = ""
    #: Version for which it was counted among the requests that had a round of full depth.
    counted_for: str | None = None
    finished: FinishReason | None = None

    #: Prompt tokens read so far.
    prefilled: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def remaining(self) -> int:
        return self.request.max_tokens - (len(self.tokens) - self.prompt_length)

    @property
    def kind(self) -> str:
        return "sampled" if self.request.sampling.temperature > 0 else "greedy"


class LocalEngine:
    """``contracts.ports.Engine`` over transformers weights on this machine.

    >>> engine = LocalEngine(settings, drafter=folder)
    >>> engine.submit(Generation(request_id="a", prompt=tuple(engine.encode("In the"))), print)
    >>> engine.close()

    A fault inside the loop ends every request with finish_reason "error" and the engine refuses new ones: a
    half-known cache must not go on answering.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        drafter: Path | None = None,
        drafter_version: str = "0",
        sink: TraceSink | None = None,
        admit: Callable[[Generation], bool] = lambda request: True,
        buffer_bytes: int = 64 << 20,
        features: FeatureMode = "bf16",
    ) -> None:
        torch.set_num_threads(settings.threads)
        folder = place.find(settings.target)
        self.folder = folder
        self._settings = settings
        self._text = Text(folder)
        self.target = Target(folder, slots=settings.max_running, context_length=settings.context_length)
        self._name = place.name(settings.target)
        self._revision = place.revision(folder)
        self._drafter: Drafter | None = None
        if drafter is not None:
            self._drafter = Drafter(
                self._load(drafter, drafter_version),
                self.target.embedding,
                slots=settings.max_running,
                length=self.target.cache.length,
            )
        self._depth = DepthControl(settings.draft_depth, settings.adaptive_depth)
        origin = Origin(NAME, self._name, self._revision, self._text.hash, self.target.config.feature_layers)
        self._admit_trace = admit
        self._capture = (
            Capture(sink, origin, topk=settings.capture_topk, buffer_bytes=buffer_bytes, eight_bits=features == "fp8")
            if sink is not None
            else None
        )
        self._keeps_features = features != "recompute"
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Generation, Callable[[Delta], None]]] = deque()
        self._running: list[_Running] = []
        #: Whose prompt is being read, in the slot behind the running ones.
        self._entering: _Running | None = None
        self._cancelled: set[str] = set()
        self._incoming: tuple[DrafterWeights, threading.Event, list[SwapReceipt]] | None = None
        self._closing = False
        self._fault: str | None = None
        self._output_tokens = 0
        self._rounds = 0
        self._by_stratum: dict[str, dict[str, tuple[int, int]]] = {}
        self._requests: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- what other threads call

    @property
    def name(self) -> str:
        """The target's name, as in ``/v1/models``."""
        return self._name

    @property
    def tokenizer_hash(self) -> str:
        """First 16 hex digits of the sha256 of the tokenizer."""
        return self._text.hash

    @property
    def target_revision(self) -> str:
        """See ``place.revision``."""
        return self._revision

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, special tokens parsed."""
        return self._text.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, special tokens left out."""
        return self._text.decode(tokens)

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Prompt ids of a chat with the generation prompt appended."""
        return self._text.render(messages)

    def status(self) -> EngineStatus:
        """A snapshot; counters are read without stopping the engine.  Overloaded once its loop has failed."""
        if self._fault:
            raise Overloaded(self._fault)
        weights = self._drafter.weights if self._drafter else None
        pass_s, draft_s = self._depth.measured()
        return EngineStatus(
            engine=NAME,
            target=self._name,
            target_revision=self._revision,
            tokenizer_hash=self._text.hash,
            context_length=self.target.config.context_length,
            drafter=weights.version if weights else "",
            drafter_checksum=weights.checksum if weights else "",
            running=len(self._running) + (self._entering is not None),
            waiting=len(self._waiting),
            output_tokens=self._output_tokens,
            rounds=self._rounds,
            by_drafter={version: _total(strata) for version, strata in [*self._by_stratum.items()]},
            by_stratum={version: dict(strata) for version, strata in [*self._by_stratum.items()]},
            requests_by_drafter=dict(self._requests),
            pass_s=pass_s,
            draft_s=draft_s,
            traces_offered=self._capture.offered if self._capture else 0,
            traces_dropped=self._capture.dropped if self._capture else 0,
            capture=self._capture is not None,
        )

    def submit(self, request: Generation, emit: Callable[[Delta], None]) -> None:
        """Queue a request.  Raises BadRequest, PromptTooLong or Overloaded."""
        limit = self.target.config.context_length
        if not request.prompt:
            raise BadRequest("the prompt is empty", field="prompt")
        if min(request.prompt) < 0 or max(request.prompt) >= self.target.config.vocab_size:
            raise BadRequest(f"token ids must be in 0..{self.target.config.vocab_size - 1}", field="prompt")
        if len(request.prompt) + request.max_tokens > limit:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and max_tokens {request.max_tokens} pass the context length of "
                f"{limit} tokens",
                field="prompt",
            )
        if request.max_tokens < 1:
            raise BadRequest("must be at least 1", field="max_tokens")
        with self._changed:
            if self._closing or self._fault:
                raise Overloaded(self._fault or "the engine is shutting down")
            if len(self._waiting) >= self._settings.max_waiting:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append((request, emit))
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Stop a request at the next step; unknown ids are ignored."""
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify()

    def swap(self, request: SwapRequest) -> SwapReceipt:
        """Verify and lay out a checkpoint on the caller's thread, exchange it between two steps of the engine's.

        Not at a lower priority: a thread that waits for a processor with the interpreter's lock in hand holds up all.
        """
        if self._drafter is None:
            raise SwapFailed("this engine was started without a drafter")
        weights = self._load(Path(request.path), request.version, self._drafter.weights)
        if weights.checksum != request.checksum:
            raise SwapFailed(f"checksum of {request.path} is {weights.checksum[:12]}, expected {request.checksum[:12]}")
        done, receipts = threading.Event(), list[SwapReceipt]()
        with self._changed:
            if self._incoming is not None:
                raise SwapFailed("another swap is under way")
            if self._closing or self._fault:
                raise SwapFailed("the engine is not running")
            self._incoming = (weights, done, receipts)
            self._changed.notify()
        done.wait()
        if not receipts:
            raise SwapFailed("the engine stopped")
        return receipts[0]

    def close(self, timeout: float = 10.0) -> None:
        """Finish running requests within ``timeout`` seconds, cancel the rest, stop."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        while self._thread.is_alive():
            for request in self._entered:
                self.cancel(request.request.request_id)
            for waiting, _ in [*self._waiting]:
                self.cancel(waiting.request_id)
            self._thread.join(max(1.0, deadline - time.monotonic()))
        if self._capture:
            self._capture.close()
            self._capture = None

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._serve()
        except BaseException as error:
            # The boundary of the thread: requests must hear of it, or their clients wait for ever.
            self._fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            with self._changed:
                if self._incoming:
                    self._incoming[1].set()

    def _serve(self) -> None:
        while self._wait():
            self._exchange_drafter()
            self._drop_cancelled()
            while self._prefill() and not any(running.rounds for running in self._running):
                pass  # nobody's answer has begun to flow: those that came together begin together
            if self._running:
                self._round()

    def _wait(self) -> bool:
        """Until there is something to do; False when closed and empty."""
        with self._changed:
            while not (self._running or self._entering or self._waiting or self._incoming):
                if self._closing:
                    return False
                self._cancelled.clear()
                self._changed.wait()
            return True

    def _exchange_drafter(self) -> None:
        if self._incoming is None or self._drafter is None:
            return
        weights, done, receipts = self._incoming
        started = time.perf_counter()
        previous, self._drafter.weights = self._drafter.weights, weights
        self._depth.swapped()
        receipts.append(
            SwapReceipt(
                version=weights.version,
                checksum=weights.checksum,
                previous=previous.version,
                applied_at=time.time(),
                stall_s=time.perf_counter() - started,
            )
        )
        self._incoming = None
        done.set()

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            dropped = [(r, emit) for r, emit in self._waiting if r.request_id in cancelled]
            for item in dropped:
                self._waiting.remove(item)
        for request, emit in dropped:
            emit(Delta(request_id=request.request_id, finish_reason="cancelled"))
        for running in self._entered:
            if running.request.request_id in cancelled:
                running.finished = "cancelled"
                running.emit(self._delta(running, (), running.text.finish(()), ()))
        self._retire()

    @property
    def _entered(self) -> list[_Running]:
        return [*self._running, self._entering] if self._entering else [*self._running]

    def _prefill(self) -> bool:
        """Read one piece of the prompt that has its turn; False when there is none, or no room for it.

        One before each round: those whose answers flow wait for at most one piece between two of their tokens.
        """
        running = self._entering = self._entering or self._admit()
        if running is None:
            return False
        at, slot = running.prefilled, len(self._running)
        piece = running.request.prompt[at : at + _PREFILL_ROWS]
        where = self.target.layout([at], len(piece), slot=slot)
        logits, features = self.target.forward(torch.tensor(piece), where, torch.tensor([len(piece) - 1]))
        running.prefilled += len(piece)
        running.unread.append(features)
        if running.recording and self._keeps_features:
            running.recording.features.append(features)
        if running.prefilled < running.prompt_length:
            return True
        self._entering = None
        self._running.append(running)
        token = int(logits.argmax()) if running.kind == "greedy" else self._drawn(running, EMPTY, logits)[1]
        if running.recording:
            running.recording.add(running.prompt_length - 1, EMPTY, (), token, self._version, logits)
        self._output_tokens += 1
        self._commit(running, [token], logits, [0])
        self._retire()
        return True

    def _admit(self) -> _Running | None:
        """The request that waited longest, if there is one and a slot for it."""
        with self._changed:
            if not self._waiting or len(self._running) >= self._settings.max_running:
                return None
            request, emit = self._waiting.popleft()
        traced = self._capture is not None and request.traced and self._admit_trace(request)
        return _Running(
            request=request,
            emit=emit,
            text=self._text.stream(request.stop),
            rng=random.Random(request.sampling.seed),
            recording=Recording(time.time()) if traced else None,
            tokens=list(request.prompt),
        )

    def _round(self) -> None:
        """One verify round of every running request: draft, verify, commit."""
        running = self._running
        depth = self._depth.choose([r.kind for r in running]) if self._drafter else 0
        started = time.perf_counter()
        proposals = self._propose(depth)
        drafted = time.perf_counter()
        rows = 1 + max(map(len, proposals))
        logits, features = self._forward(proposals, rows)
        verified = time.perf_counter()
        if self._drafter:
            # By the rows there were: near their ends requests want fewer.
            self._depth.costs(len(running), rows - 1, drafted - started, verified - drafted)
        best = logits.argmax(-1).tolist() if any(r.kind == "greedy" for r in running) else []
        for b, (request, proposal) in enumerate(zip(running, proposals, strict=True)):
            first = b * rows
            if request.kind == "greedy":
                mine = best[first : first + 1 + len(proposal)]
                path, bonus = verify_greedy(mine, proposal.tokens, proposal.parents)
            else:
                path, bonus = self._drawn(request, proposal, logits[first : first + 1 + len(proposal)])
            self._settle(b, request, proposal, path, bonus, logits, features, first)
        self._retire()

    def _propose(self, depth: int) -> list[Proposal]:
        running = self._running
        lengths = [min(depth, r.remaining - 1) for r in running]
        if self._drafter is None or not any(lengths):
            return [EMPTY] * len(running)
        hidden = self._catch_up(self._drafter)
        starts = [len(r.tokens) - 1 for r in running]
        lengths = [n if r.unread_from == start else 0 for n, r, start in zip(lengths, running, starts, strict=True)]
        if not any(lengths):
            return [EMPTY] * len(running)
        if self._settings.tree_topk > 1:
            s = self._settings
            return [
                propose_tree(self._drafter, hidden[b : b + 1], starts[b], b, n, s.tree_topk, s.tree_nodes)
                if n
                else EMPTY
                for b, n in enumerate(lengths)
            ]
        return propose_chains(
            self._drafter, hidden, starts, [r.request.sampling for r in running], [r.rng for r in running], lengths
        )

    def _catch_up(self, drafter: Drafter) -> Tensor:
        """Let the drafter read what was committed since it last drafted; returns its outputs [B, H] at the ends.

        A request that is too far behind for one round goes on in the next, and its output means nothing until then.
        In pieces of few sizes: oneDNN makes a kernel for every number of rows that it has not met, which takes several
        times as long as the product, and all requests wait for it.
        """
        running = self._running
        left = _CATCH_UP_ROWS
        for slot, r in enumerate(running):
            while left and (behind := len(r.tokens) - 1 - r.unread_from) > _BEHIND:
                unread = torch.cat(r.unread)
                n = 1 << (min(behind - 1, left).bit_length() - 1)
                left -= n
                ahead = torch.tensor(r.tokens[r.unread_from + 1 : r.unread_from + 1 + n])
                drafter.extend(unread[:n], ahead, [r.unread_from], torch.tensor([n - 1]), slot)
                r.unread, r.unread_from = [unread[n:]], r.unread_from + n
        starts = [r.unread_from for r in running]
        counts = [min(len(r.tokens) - 1 - r.unread_from, _BEHIND) for r in running]
        rows = max(counts)
        rows = rows if rows <= _BEHIND // 2 else _BEHIND
        following: list[int] = []
        features: list[Tensor] = []
        for r, n in zip(running, counts, strict=True):
            unread = torch.cat(r.unread)
            following += r.tokens[r.unread_from + 1 : r.unread_from + 1 + n] + [0] * (rows - n)
            features += [unread[:n], unread.new_zeros(rows - n, unread.shape[1])]
            r.unread, r.unread_from = [unread[n:]] if len(unread) > n else [], r.unread_from + n
        ends = torch.tensor([b * rows + n - 1 for b, n in enumerate(counts)])
        return drafter.extend(torch.cat(features), torch.tensor(following), starts, ends)

    def _forward(self, proposals: Sequence[Proposal], rows: int) -> tuple[Tensor, Tensor]:
        tokens: list[int] = []
        for r, proposal in zip(self._running, proposals, strict=True):
            tokens += [r.tokens[-1], *proposal.tokens, *[0] * (rows - 1 - len(proposal))]
        depths, ancestors = tree_layout(proposals, rows) if any(p.tree for p in proposals) else (None, None)
        starts = [len(r.tokens) - 1 for r in self._running]
        where = self.target.layout(starts, rows, depths=depths, ancestors=ancestors)
        return self.target.forward(torch.tensor(tokens), where)

    def _drawn(self, running: _Running, proposal: Proposal, logits: Tensor) -> tuple[list[int], int]:
        """Accepted nodes and the bonus token of a request that samples; logits [n + 1, V]."""
        s = running.request.sampling
        p = distribution(logits, s.temperature, s.top_k, s.top_p)
        if proposal.q is None:
            return verify_tree(p, proposal.tokens, proposal.parents, running.rng.random)
        accepted, bonus = verify_chain(p, proposal.q, proposal.tokens, running.rng.random)
        return list(range(accepted)), bonus

    def _settle(
        self,
        slot: int,
        running: _Running,
        proposal: Proposal,
        path: list[int],
        bonus: int,
        logits: Tensor,
        features: Tensor,
        first: int,
    ) -> None:
        """Make a verdict the request's new state; its rows of logits and features begin at ``first``."""
        root = len(running.tokens) - 1
        rows = [first, *(first + 1 + node for node in path)]
        if proposal.tree:
            self.target.cache.keep(slot, root + 1, [root + 1 + node for node in path])
        running.rounds += 1
        running.drafter = self._version if len(proposal) else ""
        if self._drafter or running.recording:  # else nobody reads them, and a slice for each request shows
            states = features[rows] if proposal.tree else features[first : first + len(rows)]
            if self._drafter:
                running.unread.append(states)
            if running.recording:
                mine = logits[first : first + 1 + len(proposal)]
                running.recording.add(root, proposal, path, bonus, self._version, mine)
                if self._keeps_features:
                    running.recording.features.append(states)
        before = len(running.tokens)
        self._commit(running, [*(proposal.tokens[node] for node in path), bonus], logits, rows)
        committed = len(running.tokens) - before
        self._output_tokens += committed
        self._rounds += 1
        if proposal.tokens and len(proposal) >= self._settings.draft_depth:
            # Only rounds of full depth: what a replay at that depth predicts.
            strata = self._by_stratum.setdefault(self._version, {})
            stratum = f"{running.request.domain}/{running.kind}"
            if stratum not in strata and len(strata) >= _STRATA:
                stratum = f"others/{running.kind}"
            tokens, rounds = strata.get(stratum, (0, 0))
            strata[stratum] = (tokens + committed, rounds + 1)
            if running.counted_for != self._version:
                running.counted_for = self._version
                self._requests[self._version] = self._requests.get(self._version, 0) + 1
        if len(proposal) and not proposal.tree:
            self._depth.outcome(running.kind, len(proposal), len(path))

    def _commit(self, running: _Running, tokens: list[int], logits: Tensor, rows: Sequence[int]) -> None:
        """Append tokens until one ends the request; tell the client.  ``rows[i]`` of logits produced token i."""
        text, logprobs, kept = "", [], []
        for token, row in zip(tokens, rows, strict=True):
            kept.append(token)
            running.tokens.append(token)
            if running.request.logprobs is not None:
                logprobs.append(_logprob(logits[row], token, running.request.logprobs))
            if token in self.target.config.eos and not running.request.ignore_eos:
                running.finished = "stop"
                break
            text += running.text.push(token)
            if running.text.stopped:
                running.finished = "stop"
                break
            if running.remaining == 0:
                running.finished = "length"
                break
        if running.finished:
            text += running.text.finish(running.tokens[running.prompt_length :])
        running.emit(self._delta(running, tuple(kept), text, tuple(logprobs)))

    def _delta(
        self, running: _Running, tokens: tuple[int, ...], text: str, logprobs: tuple[TokenLogprob, ...]
    ) -> Delta:
        return Delta(
            request_id=running.request.request_id,
            tokens=tokens,
            text=text,
            logprobs=logprobs,
            finish_reason=running.finished,
            output_tokens=len(running.tokens) - running.prompt_length,
            rounds=running.rounds,
            drafter=running.drafter,
        )

    def _retire(self) -> None:
        """Take finished requests out; the last slot moves into each hole so that the running stay in front."""
        behind = len(self._running)
        for slot in range(behind - 1, -1, -1):
            gone = self._running[slot]
            if gone.finished is None:
                continue
            last = self._running.pop()
            if last is not gone:
                self.target.cache.move(len(self._running), slot, len(last.tokens))
                if self._drafter:
                    self._drafter.cache.move(len(self._running), slot, len(last.tokens))
                self._running[slot] = last
            if gone.recording and self._capture:
                self._capture.finish(gone.recording, gone.request, gone.tokens, gone.finished)
        if self._entering and self._entering.finished:
            self._entering = None
        elif self._entering and len(self._running) < behind:
            self.target.cache.move(behind, len(self._running), self._entering.prefilled)

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._fault = reason
            waiting = [(r.request_id, emit) for r, emit in self._waiting]
            self._waiting.clear()
        for request_id, emit in [*((r.request.request_id, r.emit) for r in self._entered), *waiting]:
            emit(Delta(request_id=request_id, finish_reason="error", error=reason))
        self._running.clear()
        self._entering = None

    def _load(self, folder: Path, version: str, like: DrafterWeights | None = None) -> DrafterWeights:
        return load_drafter(
            folder,
            version,
            target_revision=self._revision,
            tokenizer_hash=self._text.hash,
            like=like.config if like else None,
        )

    @property
    def _version(self) -> str:
        return self._drafter.weights.version if self._drafter else ""


def _total(strata: dict[str, tuple[int, int]]) -> tuple[int, int]:
    counts = [*strata.values()]
    return sum(tokens for tokens, _ in counts), sum(rounds for _, rounds in counts)


def _logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    scores = torch.log_softmax(logits, -1)
    best = scores.topk(top) if top else None
    return TokenLogprob(
        token=token,
        logprob=float(scores[token]),
        top=tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else (),
    )
