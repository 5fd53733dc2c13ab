"""What the gateway says to SGLang, and how SGLang's answers become ours.

A request carries its labels in ``custom_params.livedraft``, where our plugin finds them (SGLang without it passes
them over), and its id in ``rid``.  An answer's ``usage.livedraft`` has the fields of the embedded engine's:

    accept_length      (output tokens - 1) / verify rounds; SGLang's own spec_accept_length counts the prefill's token
    verify_rounds      ``spec_verify_ct``, over all choices
    drafter_version    what the plugin's status said last, at Unix time ``drafter_version_as_of``: SGLang does not
                       tell it per request, so a swap within the last look may be missing

A field that is not known is absent: without speculation or for several prompts at once, of which SGLang counts one,
the first two; without the plugin the others.  Written against SGLang 0.5.23.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import msgspec
from livedraft.contracts.errors import EngineUnavailable, LivedraftError, NotFound, Overloaded
from livedraft.serving.gateway.errors import error_body
from livedraft.serving.gateway.exchange import ClientRequest, Refused
from livedraft.serving.gateway.generations import labels
from livedraft.serving.gateway.schema import Metadata, StreamOptions, convert, decode

Json = dict[str, Any]

#: Our key in ``custom_params``.
LABELS = "livedraft"

#: Routes that generate, with the prefix of their answers' ids.
_GENERATING = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}
#: Other routes of SGLang generate, too, and take no labels: an opted-out tenant's request would be learned from.
_OTHERS = re.compile(r"/v1/models(/.+)?")
#: Headers that only our own engines read.
_OURS = re.compile(rb"x-livedraft-.*|content-type", re.IGNORECASE)

#: Events that are not passed on as they are.  A quote within a JSON string is escaped, so text cannot match.
_REMARKABLE = re.compile(rb'"error":|"sglext": ?\{|"usage": ?\{|"finish_reason": ?"abort"')
_ID = re.compile(rb'^(data: \{"id":")[^"]*', re.MULTILINE)
_DATA = b"data: "
_END = b"\n\n"

#: SGLang puts pydantic's findings into its messages, and a path of its server after them.
_FINDING = re.compile(r"'loc': [(\[]'body', (?P<field>[^)\]]*)[)\]], 'msg': (?P<quote>['\"])(?P<message>.*?)(?P=quote)")
_TOO_LONG = re.compile(r"maximum context length|longer than the model's context length")
_KINDS = {429: "rate_limit_error", 503: Overloaded.kind}


class Drafting(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine said of its drafter, and when (Unix seconds); "" while it has none."""

    drafter: str = ""
    as_of: float = 0.0


class Draftsman(Protocol):
    """Who knows what an engine drafts with."""

    @property
    def drafting(self) -> Drafting | None:
        """As of the last look; None where the engine does not tell."""


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that we read or set; SGLang judges the others."""

    metadata: Metadata | None = None
    custom_params: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    return_spec_tokens_details: bool | None = None


class SglangExchange:
    """``Exchange`` with an SGLang server.  Raises NotFound for a route that is not passed on, and BadRequest."""

    def __init__(self, asked: ClientRequest, engine: Draftsman) -> None:
        self._engine = engine
        self._prefix = _GENERATING.get(asked.path)
        if self._prefix is not None and asked.method == "POST":
            self.asked = self._generating(asked, self._prefix + asked.request_id)
        elif _OTHERS.fullmatch(asked.path) and asked.method == "GET":
            self.asked = replace(asked, headers=[header for header in asked.headers if not _OURS.fullmatch(header[0])])
        else:
            raise NotFound(f"{asked.path!r} is not a path of this server")

    def _generating(self, asked: ClientRequest, answer_id: str) -> ClientRequest:
        fields = decode(asked.body, Json)
        body = convert(fields, _Body)
        origin = labels(body.metadata, asked.tenant, asked.said, asked.opted_out)
        self._id = answer_id
        self._client_asks_details = bool(body.return_spec_tokens_details)
        self._choices = (body.n or 1) * _prompts(fields)
        # With one choice for each of several prompts SGLang tells of the first alone.
        self._counted = (body.n or 1) > 1 or self._choices == 1
        self._details: list[Json] = []
        fields["rid"] = answer_id
        fields["custom_params"] = (body.custom_params or {}) | {LABELS: msgspec.to_builtins(origin)}
        if not body.stream or (body.stream_options and body.stream_options.include_usage):
            fields["return_spec_tokens_details"] = True
        headers = [header for header in asked.headers if not _OURS.fullmatch(header[0])]
        headers.append((b"content-type", b"application/json"))
        return replace(asked, headers=headers, body=msgspec.json.encode(fields))

    def whole(self, status: int, body: bytes) -> tuple[int, bytes]:
        """As ``Exchange``."""
        if status >= 400:
            status, error = _error(status, body)
            return status, msgspec.json.encode(error)
        if self._prefix is None:
            return status, body
        answer = _object(body)
        choices, usage = answer.get("choices"), answer.get("usage")
        if not isinstance(choices, list) or not isinstance(usage, dict):
            return _rendered(EngineUnavailable("the engine's answer is not one of OpenAI's"))
        if _aborted(choices):
            return _rendered(_ABORTED)
        answer["id"] = self._id
        self._take_details(answer)
        self._complete(usage)
        return status, msgspec.json.encode(answer)

    async def events(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """As ``Exchange``; ends with the first event that tells of an error."""
        begun = False
        async for block in events:
            if self._choices > 1:  # each choice has an id of its own
                block = _ID.sub(rb"\g<1>" + self._id.encode(), block)
            if not _REMARKABLE.search(block):
                begun = True
                yield block
                continue
            for event in _split(block):
                failed, passed = self._event(event)
                if failed and not begun:  # a full queue is told so, under status 200
                    raise Refused(*failed)
                if passed:
                    begun = True
                    yield passed
                if failed:
                    return

    def _event(self, event: bytes) -> tuple[tuple[int, bytes] | None, bytes]:
        """(status and body of the error that it tells of, the event as it is passed on: "" for not at all)."""
        if not event.startswith(_DATA) or not _REMARKABLE.search(event):
            return None, event
        chunk = _object(event[len(_DATA) :])
        choices, usage = chunk.get("choices"), chunk.get("usage")
        if "error" in chunk:
            status, error = _error(500, event[len(_DATA) :])
            return (status, msgspec.json.encode(error)), _written(error)
        if _aborted(choices):
            return _rendered(_ABORTED), _written(error_body(_ABORTED))
        told = self._take_details(chunk)
        if not choices and isinstance(usage, dict):
            self._complete(usage)
        elif not choices and told and "sglext" not in chunk:
            return None, b""  # it was there for us alone
        return None, _written(chunk)

    def _take_details(self, answer: Json) -> bool:
        """Note what ``answer`` tells of speculation, and take it out if the client did not ask; whether it does."""
        extra = answer.get("sglext")
        if not isinstance(extra, dict) or not (details := extra.get("spec_tokens_details")):
            return False
        self._details = details if isinstance(details, list) else [details]
        if not self._client_asks_details:
            del extra["spec_tokens_details"]
            if not extra:
                del answer["sglext"]
        return True

    def _complete(self, usage: Json) -> None:
        """Add our extension to a usage block."""
        output = usage.get("completion_tokens", 0)
        committed = max(0, output - self._choices)  # each choice's first token is the prefill's
        drafting = self._engine.drafting
        extension: Json = {}
        if self._details and self._counted:
            rounds = sum(detail.get("spec_verify_ct", 0) for detail in self._details)
            extension |= {"accept_length": committed / rounds if rounds else None, "verify_rounds": rounds}
        elif drafting and drafting.drafter and not committed:
            extension |= {"accept_length": None, "verify_rounds": 0}
        if drafting and drafting.drafter:
            extension |= {"drafter_version": drafting.drafter, "drafter_version_as_of": drafting.as_of}
        if extension:
            usage[LABELS] = extension


_ABORTED = Overloaded("the engine ended the request before it was answered; try again")


def _prompts(fields: Mapping[str, Any]) -> int:
    prompt = fields.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _aborted(choices: object) -> bool:
    listed = choices if isinstance(choices, list) else []
    return any(isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in listed)


def _split(block: bytes) -> Iterator[bytes]:
    """Its events, each with its end."""
    *whole, rest = block.split(_END)
    yield from (event + _END for event in whole)
    if rest:
        yield rest


def _written(content: object) -> bytes:
    return _DATA + msgspec.json.encode(content) + _END


def _object(body: bytes) -> Json:
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _rendered(error: LivedraftError) -> tuple[int, bytes]:
    return error.status, msgspec.json.encode(error_body(error))


def _error(status: int, body: bytes) -> tuple[int, Json]:
    """An error of SGLang's in one of its shapes, as status and object of OpenAI's.

    ``{"object": "error", "message", "type", "param", "code"}``, the same within ``{"error": ...}``,
    ``{"error": "Unauthorized"}`` or ``{"detail": "Not Found"}``.
    """
    found = _object(body)
    inner = found.get("error")
    told: Json = inner if isinstance(inner, dict) else found
    if isinstance(inner, dict) and isinstance(told.get("code"), int) and 400 <= told["code"] < 600:
        status = told["code"]
    if status in (401, 403):  # the client's own key was in order
        error = EngineUnavailable("the engine does not accept the gateway's key")
        return error.status, error_body(error)
    message, param, code = told.get("message") or told.get("detail") or inner, told.get("param"), told.get("code")
    message = message if isinstance(message, str) else f"the engine answered with status {status}"
    if finding := _FINDING.search(message):
        param = ".".join(re.findall(r"\w+", finding["field"])) or None
        message = f"{param}: {finding['message']}" if param else finding["message"]
    code = code if isinstance(code, str) else None
    if status == Overloaded.status:
        code = Overloaded.code
    elif _TOO_LONG.search(message):
        code = "context_length_exceeded"
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message.partition("\n")[0], "type": kind, "param": param, "code": code}}
