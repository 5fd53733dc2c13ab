"""Answers in OpenAI's shapes.  Both kinds of answer have the same ``Rendering``, so the routes need not know which.

Extension: ``usage.livedraft`` tells how well the request was speculated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, Protocol

from livedraft.contracts.errors import LivedraftError, Overloaded
from livedraft.contracts.messages import Delta, FinishReason, TokenLogprob

Json = dict[str, Any]


class Choice:
    """One choice as its Deltas arrive."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self.last = Delta(request_id="")

    def add(self, delta: Delta) -> None:
        """Append what an engine step yielded.  Raises what a client is to see when the engine gave up."""
        if delta.finish_reason == "error":
            raise LivedraftError(delta.error or "the engine failed")
        if delta.finish_reason == "cancelled":
            raise Overloaded("the server is shutting down")
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.last = delta


class Rendering(Protocol):
    """How a chat or a completion is written down."""

    #: Prefix of the answer's id, ``object`` of a whole answer and of a chunk.
    prefix: str
    whole: str
    part: str

    def choice(self, choice: Choice) -> Json:
        """A finished choice."""

    def opening(self, index: int) -> Json | None:
        """What a choice's stream starts with, if anything."""

    def piece(self, choice: Choice, delta: Delta) -> Json:
        """What ``delta``, already added to ``choice``, adds to its stream."""


class ChatRendering:
    """``chat.completion``.  ``spell`` gives a token's text."""

    prefix = "chatcmpl-"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def __init__(self, spell: Callable[[int], str]) -> None:
        self._spell = spell

    def choice(self, choice: Choice) -> Json:
        """A finished choice with its message."""
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.last.finish_reason,
        }

    def opening(self, index: int) -> Json:
        """The role, before any text."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, choice: Choice, delta: Delta) -> Json:
        """New text; the last piece may have none."""
        return {
            "index": choice.index,
            "delta": {"content": delta.text} if delta.text or delta.logprobs else {},
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> Json | None:
        if not entries:
            return None
        content = [
            self._spelled(entry.token, entry.logprob) | {"top_logprobs": [self._spelled(*top) for top in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _spelled(self, token: int, logprob: float) -> Json:
        text = self._spell(token)
        # A token that is part of a character has bytes that its text does not tell; OpenAI has null for unknown.
        known = list(text.encode()) if "\N{REPLACEMENT CHARACTER}" not in text else None
        return {"token": text, "logprob": logprob, "bytes": known}


class CompletionRendering:
    """``text_completion``.  ``spell`` gives a token's text."""

    prefix = "cmpl-"
    whole = "text_completion"
    part = "text_completion"

    def __init__(self, spell: Callable[[int], str]) -> None:
        self._spell = spell
        #: Where the next token of each choice starts in its text.
        self._offset: dict[int, int] = defaultdict(int)

    def choice(self, choice: Choice) -> Json:
        """A finished choice with its text."""
        return self._written(choice.index, choice.text, choice.logprobs, choice.last.finish_reason)

    def opening(self, index: int) -> None:
        """Nothing."""

    def piece(self, choice: Choice, delta: Delta) -> Json:
        """New text; the last piece may have none."""
        return self._written(choice.index, delta.text, delta.logprobs, delta.finish_reason)

    def _written(self, index: int, text: str, entries: Sequence[TokenLogprob], finish: FinishReason | None) -> Json:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, entries), "finish_reason": finish}

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> Json | None:
        if not entries:
            return None
        tokens = [self._spell(entry.token) for entry in entries]
        *offsets, self._offset[index] = accumulate(map(len, tokens), initial=self._offset[index])
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._alternatives(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens and, as OpenAI does, always the sampled one.  Of two with one spelling the better is kept."""
        best: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            best.setdefault(self._spell(token), logprob)
        return best


def usage(prompt_tokens: int, choices: Iterable[Choice]) -> Json:
    """The usage block over all choices; ``accept_length`` is null before the first verify round."""
    last = [choice.last for choice in choices]
    output = sum(delta.output_tokens for delta in last)
    committed = sum(max(0, delta.output_tokens - 1) for delta in last)  # the first token is the prefill's
    rounds = sum(delta.rounds for delta in last)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output,
        "total_tokens": prompt_tokens + output,
        "livedraft": {
            "accept_length": committed / rounds if rounds else None,
            "verify_rounds": rounds,
            "drafter_version": last[-1].drafter,
        },
    }


class Answer:
    """One HTTP request's answer: what its choices' Deltas become, whole or as a stream of chunks."""

    def __init__(
        self, rendering: Rendering, *, answer_id: str, model: str, created: int, prompt_tokens: int, choices: int
    ) -> None:
        self._rendering = rendering
        self._head = {"id": answer_id, "created": created, "model": model}
        self._prompt_tokens = prompt_tokens
        self._choices = [Choice(index) for index in range(choices)]

    async def whole(self, deltas: AsyncIterator[tuple[int, Delta]]) -> Json:
        """The answer, when every choice is finished.  Raises what the engine reported."""
        async for index, delta in deltas:
            self._choices[index].add(delta)
        choices = [self._rendering.choice(choice) for choice in self._choices]
        return self._head | {"object": self._rendering.whole, "choices": choices, "usage": self._usage}

    async def chunks(self, deltas: AsyncIterator[tuple[int, Delta]], include_usage: bool) -> AsyncIterator[Json]:
        """Chunk by chunk, as the choices grow.  Raises what the engine reported."""
        extra = {"usage": None} if include_usage else {}
        head = self._head | {"object": self._rendering.part}
        for choice in self._choices:
            if opening := self._rendering.opening(choice.index):
                yield head | {"choices": [opening]} | extra
        async for index, delta in deltas:
            choice = self._choices[index]
            choice.add(delta)
            # Text may be held back while it could be the start of a stop string.
            if delta.text or delta.logprobs or delta.finish_reason:
                yield head | {"choices": [self._rendering.piece(choice, delta)]} | extra
        if include_usage:
            yield head | {"choices": [], "usage": self._usage}

    @property
    def _usage(self) -> Json:
        return usage(self._prompt_tokens, self._choices)
