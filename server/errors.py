"""Every error leaves as `{"error": {message, type, param, code}}`, the shape of the OpenAI API; on
`/v1/messages` as `{"type": "error", "error": {type, message}}`, Anthropic's.

One table: HTTP status → (type, code). The class of a `SteeringError` decides its status.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from adapters.errors import (
    AdapterError,
    BadAdapter,
    BadSource,
    Conflict,
    EngineAway,
    FilesLost,
    NoAdapter,
    NoRoom,
    RegistryAway,
    ServerFault,
    SourceAway,
    StoreFull,
    TooLarge,
)
from adapters.errors import DoesNotFit as AdapterDoesNotFit
from server.paths import is_messages
from server.vllm_words import PROMPT, in_our_words, is_too_long
from steering.errors import BadValue, DoesNotFit, NotFound, SteeringError

TOO_LONG = "context_length_exceeded"
"""The code, OpenAI's, of a prompt that does not fit into the context, by itself or together with
the reply that is asked for. Clients shorten the prompt upon it."""

_TABLE: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "body_timeout"),
    409: ("conflict_error", "conflict"),
    413: ("invalid_request_error", "body_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    422: ("unprocessable_entity_error", "does_not_fit"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    431: ("invalid_request_error", "head_too_large"),
    500: ("server_error", "internal_error"),
    501: ("server_error", "not_implemented"),
    503: ("service_unavailable_error", "unavailable"),
    504: ("timeout_error", "request_timeout"),
    507: ("server_error", "no_room"),
}

_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's words by status; for the others `invalid_request_error` below 500, `api_error` from
there on (https://docs.anthropic.com/en/api/errors)."""

_STATUS: tuple[tuple[type[SteeringError], int], ...] = (
    (NotFound, 404),
    (DoesNotFit, 422),
    (BadValue, 400),
)


_ADAPTER_STATUS: tuple[tuple[type[AdapterError], int], ...] = (
    (NoAdapter, 404),
    (Conflict, 409),
    (TooLarge, 413),
    (BadAdapter, 422),
    (AdapterDoesNotFit, 422),
    (BadSource, 400),
    (StoreFull, 507),
    (NoRoom, 503),
    (SourceAway, 503),
    (FilesLost, 503),
    (EngineAway, 503),
    (RegistryAway, 503),
    (ServerFault, 500),
    (AdapterError, 422),
)


class TooLong(BadValue):
    """Prompt and reply do not fit into the context."""


class HttpError(Exception):
    """An answer other than 2xx, decided by us.

    Args:
        status: HTTP status.
        message: one sentence for a person.
        param: the request field it is about.
        code: a word for programs; default: from the table.
        retry_after_s: seconds after which a retry makes sense (header `Retry-After`).
        reason: why the gate refuses, a word of `metrics.REASONS`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.reason = reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends itself: an error is an ASGI application, so middleware can answer with it."""
        await response(self, scope["path"])(scope, receive, send)


def body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The error body for a status."""
    kind, default = _TABLE.get(status, ("invalid_request_error", "error") if status < 500
                               else _TABLE[500])  # fmt: skip
    return {"error": {"message": message, "type": kind, "param": param, "code": code or default}}


def code_of(error: HttpError) -> str:
    """The word for programs that an error has in its body."""
    return str(body(error.status, error.message, code=error.code)["error"]["code"])


def error_body(error: HttpError, path: str) -> dict[str, Any]:
    """The error body in the shape of the path's API."""
    if not is_messages(path):
        return body(error.status, error.message, error.param, error.code)
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC.get(error.status, kind)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def response(error: HttpError, path: str) -> JSONResponse:
    """The HTTP answer for an error on a path."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error, path), error.status, headers)


def from_steering(error: SteeringError) -> HttpError:
    """A caller's fault as an HTTP error; `param` is the field."""
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    code = TOO_LONG if isinstance(error, TooLong) else None
    return HttpError(status, str(error), param=error.field or None, code=code)


def status_of(kind: type[AdapterError]) -> int:
    """The HTTP status of a class of errors of the adapter layer."""
    return next(status for base, status in _ADAPTER_STATUS if issubclass(kind, base))


def from_adapters(error: AdapterError) -> HttpError:
    """An error of the adapter layer as an HTTP error; `param` is the field."""
    status = status_of(type(error))
    retry = 5 if status == 503 else None
    code = "model_not_found" if status == 404 and error.field == "model" else None
    return HttpError(status, str(error), param=error.field or None, code=code,
                     retry_after_s=retry)  # fmt: skip


_APPENDED = re.compile(r" \(parameter=\w+(, value=.*)?\)$", re.DOTALL)
"""What vLLM appends to a message and also says in `param`."""

_FIELD_FIRST = re.compile(r"([a-z][a-z_]*)(?:=\S+)? (?:must|cannot|can only|is only|is not) ")
"""How vLLM's messages begin where it leaves `param` out: `n must be at least 1`."""


def from_vllm(error: dict[str, Any]) -> HttpError:
    """The `error` object of one of vLLM's answers, with our types and codes.

    Its `code` is the HTTP status; its `param` starts with `body.` for schema errors.
    """
    message = str(error["message"])
    try:
        status = HTTPStatus(int(error.get("code") or 500)).value
    except ValueError:
        status = 500
    param = error.get("param")
    if isinstance(param, str):
        param = param.removeprefix("body.") or None
    elif status == 400 and (field := _FIELD_FIRST.match(message)):
        param = field[1]
    code = "model_not_found" if status == 404 and param == "model" else None
    if status == 400 and is_too_long(message):
        code, param = TOO_LONG, param or PROMPT
    retry = 5 if status == 503 else None
    message = in_our_words(_APPENDED.sub("", message))
    return HttpError(status, message, param=param, code=code, retry_after_s=retry)


def in_the_request_s_words(error: HttpError, fields: Mapping[str, str]) -> HttpError:
    """The error with the request's own name of the field that it is about.

    Args:
        error: it is changed in place.
        fields: vLLM's name of a field → the request's.
    """
    if error.param is not None and (name := fields.get(error.param)) is not None:
        error.message = re.sub(rf"^{re.escape(error.param)}\b", name, error.message)
        error.param = name
    return error


def event(path: str, error: HttpError, number: int = 0) -> str:
    """The error as the end of a stream whose first byte is out, as the path's API has it.

    Args:
        path: of the API.
        error: what ends the stream.
        number: of events before it.
    """
    content = error_body(error, path)
    if is_messages(path):
        return f"event: error\ndata: {json.dumps(content)}\n\n"
    if path == "/v1/responses":
        event = {"type": "error", **{k: content["error"][k] for k in ("code", "message", "param")},
                 "sequence_number": number}  # fmt: skip
        return f"event: error\ndata: {json.dumps(event)}\n\n"
    return f"data: {json.dumps(content)}\n\n"
