"""Requests as OpenAI's clients write them, strict about types; each error names its field.

Fields that would change the answer and are not supported are refused; other unknown ones are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from livedraft.contracts.errors import BadRequest
from livedraft.contracts.ports import Engine
from msgspec import Meta

T = TypeVar("T")

Positive = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
StopString = Annotated[str, Meta(min_length=1)]
Domain = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[\w.:/-]+\Z")]

#: Unsupported field -> the values, besides null, that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what requests are made of."""


class StreamOptions(_Part, frozen=True, kw_only=True):
    """``stream_options``."""

    include_usage: bool | None = None


class Metadata(_Part, frozen=True, kw_only=True):
    """``metadata``: its ``domain`` labels the traffic, the rest is the caller's."""

    domain: Domain | None = None


class TextPart(_Part, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """A text part of a message's content."""

    text: str


class Message(_Part, frozen=True, kw_only=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The turn as templates want it: parts joined by newlines; "developer" is OpenAI's new name for "system"."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": role, "content": text}


class Asked(_Part, frozen=True, kw_only=True):
    """What both kinds of request share.  ``top_k`` and ``ignore_eos`` are extensions."""

    model: str
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    #: 0 and -1 mean no limit.
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    n: Positive | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    metadata: Metadata | None = None

    def __post_init__(self) -> None:
        if self.stream_options and not self.stream:
            raise BadRequest("is only allowed with stream", field="stream_options")

    @property
    def choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Asked, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("is only allowed with logprobs", field="top_logprobs")

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the output; None: what fits."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """``Generation.logprobs``."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, engine: Engine) -> list[list[int]]:
        """The rendered chat's token ids; takes a moment for a long one."""
        return [engine.render([message.plain() for message in self.messages])]


class CompletionRequest(Asked, frozen=True, kw_only=True):
    """``POST /v1/completions``."""

    #: A string, strings, token ids, or lists of token ids.
    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of not in (None, self.choices):
            raise BadRequest("is not supported unless it equals n", field="best_of")
        if isinstance(self.prompt, list) and len({type(item) for item in self.prompt}) > 1:
            raise BadRequest("mixes strings, token ids and lists", field="prompt")

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the output; None: OpenAI's 16, or less where less fits."""
        return "max_tokens", self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """``Generation.logprobs``."""
        return self.logprobs

    def prompts(self, engine: Engine) -> list[list[int]]:
        """Token ids of every prompt; takes a moment for long ones."""
        if isinstance(self.prompt, str):
            return [engine.encode(self.prompt)]
        if ids := [item for item in self.prompt if isinstance(item, int)]:
            return [ids]
        several = [item for item in self.prompt if not isinstance(item, int)]
        return [engine.encode(item) if isinstance(item, str) else item for item in several]


def decode(body: bytes, kind: type[T], unsupported: Mapping[str, tuple[object, ...]] = {}) -> T:
    """A request from its JSON.  Raises BadRequest naming the field and what was expected."""
    try:
        fields: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadRequest("the body must be a JSON object")
    for name, harmless in unsupported.items():
        if fields.get(name) is not None and fields[name] not in harmless:
            raise BadRequest("is not supported", field=name)
    return convert(fields, kind)


def convert(value: object, kind: type[T], field: str | None = None) -> T:
    """``value`` as ``kind``.  Raises BadRequest in terms of ``field``, or of the path msgspec reports."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`").lstrip(".")
        if missing := re.fullmatch(r"Object missing required field `(\w+)`", message):
            message, path = "is required", ".".join(filter(None, (path, missing[1])))
        raise BadRequest(message, field=field or path or None) from error
