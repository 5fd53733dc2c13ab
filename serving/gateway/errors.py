"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from livedraft.contracts.errors import BadRequest, LivedraftError, NotFound, Overloaded, Unauthorized
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

#: What nginx logs when the client left before the answer; nobody receives it, metrics count it.
CLIENT_CLOSED_REQUEST = 499


class ModelNotFound(NotFound):
    """The ``model`` of a request is not the one served here."""

    code = "model_not_found"


def error_body(error: LivedraftError) -> dict[str, Any]:
    """The error object, also sent as an event when a stream fails midway."""
    param = error.field if isinstance(error, BadRequest) else None
    return {"error": {"message": str(error), "type": error.kind, "param": param, "code": error.code}}


def error_response(error: LivedraftError) -> Response:
    """The error object with its status and the headers HTTP asks for."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = "1"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return Response(msgspec.json.encode(error_body(error)), error.status, headers, "application/json")


def install(app: FastAPI) -> None:
    """Render every error of ``app``'s routes, the framework's own included."""
    app.add_exception_handler(LivedraftError, _ours)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, LivedraftError)
    return error_response(error)


async def _framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"message": f"{request.method} {request.url.path}: {error.detail}", "type": "invalid_request_error"}
    content = msgspec.json.encode({"error": body | {"param": None, "code": None}})
    return Response(content, error.status_code, error.headers, "application/json")


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _unexpected(request: Request, _: Exception) -> Response:
    # A bug of ours.  Starlette raises it again after this answer, so the log has the traceback; the client gets none.
    response = error_response(LivedraftError(f"internal error; the log has it at request {request.state.request_id}"))
    response.headers["x-request-id"] = request.state.request_id  # this handler runs outside the middleware
    response.headers["connection"] = "close"  # as the server will, having seen the exception
    return response
