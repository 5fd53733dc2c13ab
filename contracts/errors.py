"""One tree of errors; each knows the HTTP status it is rendered with.

LivedraftError
├── BadRequest             400  a field of the request is wrong; names it
│   └── PromptTooLong      400
├── Unauthorized           401
├── NotFound               404  unknown model, version or alias
├── BodyTooLarge           413
├── Overloaded             503  no free place, or shutting down
├── EngineUnavailable      502  the engine behind the gateway failed
├── SettingsError          500  a settings file; names file and key
├── TraceError             500
│   ├── CorruptRecord      500  bytes that are not a trace; dead-lettered, never fatal to a reader
│   ├── UnsupportedSchema  500  a newer major version; dead-lettered
│   └── StreamUnavailable  503  the broker does not answer; serving goes on
├── DrafterRejected        422  a candidate that must not reach serving; names the file or tensor
├── RegistryUnavailable    503
└── SwapFailed             409  the engine kept what it had
"""

from __future__ import annotations

from typing import ClassVar


class LivedraftError(Exception):
    """Root of every error raised on purpose.  ``kind`` is the ``type`` of OpenAI's error object."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None


class BadRequest(LivedraftError):
    """A request field is wrong: ``BadRequest("must be at least 0", field="temperature")``."""

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class PromptTooLong(BadRequest):
    """Prompt plus ``max_tokens`` does not fit the context length."""

    code = "context_length_exceeded"


class Unauthorized(LivedraftError):
    """Missing or wrong API key."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class NotFound(LivedraftError):
    """Unknown model, version or alias."""

    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class BodyTooLarge(LivedraftError):
    """The request body passes the configured limit."""

    status = 413
    kind = "invalid_request_error"
    code = "body_too_large"


class Overloaded(LivedraftError):
    """The waiting line is full, or the server is shutting down."""

    status = 503
    kind = "overloaded_error"
    code = "overloaded"


class EngineUnavailable(LivedraftError):
    """The engine behind the gateway failed, or sent nothing for too long; no other could take over."""

    status = 502
    code = "engine_unavailable"


class SettingsError(LivedraftError):
    """A settings file that cannot be used; the message names file and key."""


class TraceError(LivedraftError):
    """Anything wrong with a trace."""


class CorruptRecord(TraceError):
    """Bytes that do not decode to a trace."""


class UnsupportedSchema(TraceError):
    """A trace whose major schema version is newer than this reader."""


class StreamUnavailable(TraceError):
    """The broker does not answer, or does not let us in; traces wait or are dropped, serving goes on."""

    status = 503


class DrafterRejected(LivedraftError):
    """A drafter checkpoint that must not reach serving; the message names the file or tensor and why."""

    status = 422
    kind = "invalid_request_error"
    code = "drafter_rejected"


class RegistryUnavailable(LivedraftError):
    """The registry does not answer; decisions wait, serving goes on."""

    status = 503


class SwapFailed(LivedraftError):
    """The engine refused or could not confirm a swap; it serves what it served before."""

    status = 409
    kind = "invalid_request_error"
    code = "swap_failed"
