"""Between text and tokens: chat template, incremental detokenisation, stop strings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from livedraft.contracts.errors import BadRequest
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast


class Text:
    """The target's tokenizer and chat template.  Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, use_fast=True)
        if not self.tokenizer.is_fast:
            raise BadRequest(f"{folder} has no tokenizer.json", field="target")
        content = self.tokenizer.backend_tokenizer.to_str()
        self.hash = hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids, special tokens parsed and those a fresh document begins with added."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text, special tokens left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Prompt ids of a chat, ready for the assistant's turn.  BadRequest when the template refuses the roles."""
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise BadRequest("this target has no chat template; use /v1/completions", field="messages")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise BadRequest(str(error), field="messages") from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def stream(self, stop: Sequence[str]) -> TextStream:
        """A detokeniser for one request."""
        return TextStream(self, stop)


class TextStream:
    """Text of one growing output.

    What ``push`` returns never ends in half a character nor in the beginning of a stop string that may still
    complete; once ``stopped`` it never will return more.
    """

    def __init__(self, text: Text, stop: Sequence[str]) -> None:
        self._text = text
        self._backend = text.tokenizer.backend_tokenizer
        self._stop = tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self._seen = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that ``token`` settles, without the stop string and what follows it."""
        piece = self._decoder.step(self._backend, token)
        if not piece:
            return ""
        self._seen += len(piece)
        self._held += piece
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            settled, self._held, self.stopped = self._held[: min(found)], "", True
            return settled
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        settled = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return settled

    def finish(self, output: Sequence[int]) -> str:
        """What is left when the whole output is known: a held-back prefix, a last broken character."""
        if self.stopped:
            return ""
        return self._held + self._text.decode(output)[self._seen :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, ``stop`` itself excluded."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
