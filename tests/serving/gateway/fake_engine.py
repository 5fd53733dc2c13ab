"""An engine of fixed words: one token a byte, three tokens a verify round, one thread, no weights."""

from __future__ import annotations

import codecs
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from livedraft.contracts.errors import BadRequest, DrafterRejected, Overloaded
from livedraft.contracts.messages import (
    Delta,
    EngineStatus,
    FinishReason,
    Generation,
    SwapReceipt,
    SwapRequest,
    TokenLogprob,
)

WORDS = "It was the best of times, it was the wörst of times; it was the age of wisdom. "
ROUND = 3


class FakeEngine:
    """``contracts.ports.Engine``.  An output depends on the seed alone, ends by itself after ``length`` tokens.

    ``step_s`` seconds pass between rounds.  ``fail_after`` rounds a request reports ``failure``; ``stalled``
    requests get no round at all; ``capacity`` requests fit; ``broken`` is raised by submit and status.
    """

    def __init__(
        self,
        *,
        step_s: float = 0.001,
        length: int = 60,
        context_length: int = 512,
        fail_after: int | None = None,
        failure: str = "the cache is on fire",
        stalled: bool = False,
        capacity: int = 1000,
    ) -> None:
        self.step_s = step_s
        self.length = length
        self.context_length = context_length
        self.fail_after = fail_after
        self.failure = failure
        self.stalled = stalled
        self.capacity = capacity
        self.broken: Exception | None = None
        self.submitted: list[Generation] = []
        self.cancelled: list[str] = []
        self.swaps: list[SwapRequest] = []
        self.closed = False
        self.output_tokens = 0
        self.rounds = 0
        self.drafter = "7"
        self._running: dict[str, _Sequence] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)
        self._thread.start()

    def status(self) -> EngineStatus:
        if self.broken:
            raise self.broken
        return EngineStatus(
            engine="fake",
            target="fake",
            target_revision="r1",
            tokenizer_hash="t1",
            context_length=self.context_length,
            drafter=self.drafter,
            drafter_checksum="c" + self.drafter,
            running=len(self._running),
            waiting=2,
            output_tokens=self.output_tokens,
            rounds=self.rounds,
            by_drafter={"7": (self.output_tokens, self.rounds), "8": (0, 0)},
            traces_offered=5,
            traces_dropped=1,
        )

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if messages[-1]["role"] == "assistant":
            raise BadRequest("the last turn must not be the assistant's", field="messages")
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in messages))

    def submit(self, request: Generation, emit: Callable[[Delta], None]) -> None:
        if self.broken:
            raise self.broken
        with self._lock:
            if self.closed or len(self._running) >= self.capacity:
                raise Overloaded("no place left")
            self.submitted.append(request)
            self._running[request.request_id] = _Sequence(request, emit, self.length)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if sequence := self._running.pop(request_id, None):
                self.cancelled.append(request_id)
                sequence.end("cancelled")

    def swap(self, request: SwapRequest) -> SwapReceipt:
        if request.checksum == "bad":
            raise DrafterRejected("tensor fc.weight: NaN or infinity")
        self.swaps.append(request)
        previous, self.drafter = self.drafter, request.version
        return SwapReceipt(
            version=request.version, checksum=request.checksum, previous=previous, applied_at=time.time(), stall_s=0.002
        )

    def close(self, timeout: float = 10.0) -> None:
        self.closed = True
        self._thread.join(timeout)
        for request_id in list(self._running):
            self.cancel(request_id)

    def _loop(self) -> None:
        while not (self.closed and not self._running):
            time.sleep(self.step_s)
            with self._lock:
                for request_id, sequence in () if self.stalled else list(self._running.items()):
                    if sequence.rounds == self.fail_after:
                        sequence.end("error", self.failure)
                    else:
                        self.output_tokens += sequence.step(self.drafter)
                        self.rounds += 1
                    if sequence.ended:
                        del self._running[request_id]


class _Sequence:
    def __init__(self, request: Generation, emit: Callable[[Delta], None], length: int) -> None:
        self.request = request
        self.emit = emit
        self.rounds = 0
        self.ended = False
        self.done = 0
        self.output, self.text_bytes, self.reason = expected(request, length)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, drafter: str) -> int:
        start, self.done = self.done, min(self.done + ROUND, len(self.output))
        self.rounds += 1
        tokens = self.output[start : self.done]
        self.ended = self.done == len(self.output)
        text = self._decoder.decode(self.output[start : min(self.done, self.text_bytes)], self.ended)
        finish = self.reason if self.ended else None
        self._emit(
            tokens=tuple(tokens), text=text, logprobs=self._logprobs(tokens), finish_reason=finish, drafter=drafter
        )
        return len(tokens)

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        self.ended = True
        self._emit(finish_reason=reason, error=error)

    def _logprobs(self, tokens: bytes) -> tuple[TokenLogprob, ...]:
        if self.request.logprobs is None:
            return ()
        alternatives = range(self.request.logprobs)
        return tuple(
            TokenLogprob(token=t, logprob=-0.5, top=tuple((t - i, -0.5 - i) for i in alternatives)) for t in tokens
        )

    def _emit(self, **fields: Any) -> None:
        self.emit(Delta(request_id=self.request.request_id, output_tokens=self.done, rounds=self.rounds, **fields))


def expected(request: Generation, length: int) -> tuple[bytes, int, FinishReason]:
    """Tokens of a request's output, how many of them are shown as text, and why it ends."""
    shift = (request.sampling.seed or 0) % len(WORDS)
    words = (WORDS[shift:] + WORDS * 100).encode()
    output = words[: request.max_tokens] if request.ignore_eos else words[: min(length, request.max_tokens)]
    stops = [(at, stop.encode()) for stop in request.stop if (at := output.find(stop.encode())) >= 0]
    if stops:
        at, stop = min(stops)
        return output[: at + len(stop)], at, "stop"
    return output, len(output), "length" if len(output) == request.max_tokens else "stop"
