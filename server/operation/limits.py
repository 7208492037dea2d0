"""What one request may take: bytes, seconds, tokens, replies. All limits of a request are here;
those of a caller per minute are in `server.operation.rate_limits`.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from server import errors
from server.context import context_of
from server.errors import HttpError, TooLong
from server.settings.operating import LimitsConfig, ServerConfig
from server.vllm_words import PROMPT
from steering.errors import BadValue

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

_CLOSE = (b"connection", b"close")


class RequestLimits:
    """Bounds one request in size and in time, between the HTTP server and the application.

    Once the request's time is over the application sees the client leave, which frees
    everything as if it had; what it still says is dropped, and the client gets an error.

    Args:
        scope, receive, send: the server's.
        server: section `server`.
        limits: section `limits`.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        server: ServerConfig,
        limits: LimitsConfig,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._max_bytes, self._limits = server.max_body_bytes, limits
        now = asyncio.get_running_loop().time()
        self._body_end, self._end = now + limits.body_timeout_s, now + limits.request_timeout_s
        self._read, self._whole = 0, False
        self._late, self._complete, self._streams = False, False, False
        self._unread = False
        """The body is not read to its end, so the connection cannot be used again."""
        self.begun = False
        """Whether the status is out."""

    async def receive(self) -> MutableMapping[str, Any]:
        """The next message from the client.

        Raises:
            HttpError: 413, the body is too large, also one without a length; 408, it is too slow.
        """
        if self._late:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._end if self._whole else self._body_end):
                message = await self._receive()
        except TimeoutError:
            if not self._whole:
                self._unread = True
                raise self._slow() from None
            self._late = not self._complete
            return {"type": "http.disconnect"}
        self._whole |= message["type"] != "http.request" or not message.get("more_body")
        self._read += len(message.get("body", b""))
        if self._read > self._max_bytes:
            self._unread = True
            raise too_large(self._max_bytes)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """A message of the application to the client."""
        if self._late:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            headers = message.setdefault("headers", [])
            self._streams = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in headers
            )
            if self._unread:
                message = last(message)
        elif message["type"] == "http.response.body":
            self._complete |= not message.get("more_body")
        await self._send(message)

    @property
    def open(self) -> bool:
        """Whether an answer has begun and is not complete."""
        return self.begun and not self._complete

    async def finish(self) -> None:
        """Tells the client that its time was over, if it was."""
        if self._late:
            await self.break_off(
                HttpError(504, "The request took longer than limits.request_timeout_s "
                          f"({self._limits.request_timeout_s:g} s).")
            )  # fmt: skip

    async def break_off(self, error: HttpError) -> None:
        """Ends an answer that the application will not end: by an error, or as a stream's end."""
        if not self.begun:
            await error(self._scope, self._receive, self._send)
            return
        if self._complete:
            return
        context = context_of(self._scope)
        context.fail(error)
        text = ""
        if self._streams:
            text = errors.event(self._scope["path"], error, context.events)
        await self._send({"type": "http.response.body", "body": text.encode()})

    def _slow(self) -> HttpError:
        return HttpError(
            408,
            "The request body was not there after limits.body_timeout_s "
            f"({self._limits.body_timeout_s:g} s).",
            reason="body_timeout",
        )


def check_counts(
    config: LimitsConfig,
    *,
    prompts: int,
    n: int,
    drawn: int,
    drawn_field: str,
    max_tokens: int | None,
    field: str,
) -> None:
    """Refuses what is more than one request may ask for.

    Args:
        config: section `limits`.
        prompts: how many it has.
        n: replies that it gets for each.
        drawn: replies, or blocks at a time, that are drawn for each of these (`best_of_n` and
            `guided_search` draw several).
        drawn_field: what the request calls that.
        max_tokens: asked for explicitly, or None.
        field: what the request calls that.

    Raises:
        BadValue: more than `limits.max_replies` or `limits.max_output_tokens`.
    """
    most = config.max_output_tokens
    if most is not None and max_tokens is not None and max_tokens > most:
        raise BadValue("longer than this server's replies", field=field, value=max_tokens,
                       allowed=f"at most {most}")  # fmt: skip
    replies = prompts * n * drawn
    if replies > config.max_replies:
        factors = f"{prompts} prompts × n {n}" + (f" × {drawn} drawn for each" * (drawn > 1))
        raise BadValue(f"more replies than one request may draw ({factors})",
                       field=drawn_field if drawn > 1 else "n", value=replies,
                       allowed=f"at most {config.max_replies}")  # fmt: skip


def check_prompt(config: LimitsConfig, tokens: int) -> None:
    """Refuses a prompt that is too long.

    Raises:
        BadValue: more than `limits.max_prompt_tokens`; the field is vLLM's name of the prompt.
    """
    most = config.max_prompt_tokens
    if most is not None and tokens > most:
        raise BadValue("the prompt has more tokens than this server takes", field=PROMPT,
                       value=tokens, allowed=f"at most {most}")  # fmt: skip


def limit_reply(params: SamplingParams, most: int | None) -> None:
    """Lets a reply have at most `most` tokens; `params` is changed in place."""
    if most is not None and params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, most)


def fit_context(
    params: SamplingParams, max_tokens: int | None, field: str, prompt: int, pad: int, context: int
) -> None:
    """Keeps the reply inside what the context leaves it; `params` is changed in place.

    Args:
        params: of the request.
        max_tokens: the caller's own limit of the reply's tokens, or None.
        field: what the request calls that.
        prompt: tokens of the longest prompt of the request.
        pad: by how many it is longer than the base's.
        context: tokens of prompt and reply together.

    Raises:
        BadValue: there is no room, or a stream's own prompt takes what was asked for. Where the
            base's prompt does, the reply is cut, as vLLM does it.
    """
    room = context - prompt
    if room < 1:
        raise TooLong(f"the longest prompt of the request has {prompt} tokens",
                      field="steering.prompts" if pad else PROMPT,
                      allowed=f"at most {context - 1}")  # fmt: skip
    if max_tokens is not None and pad and max_tokens > room:
        raise TooLong(f"a stream's own prompt of {prompt} tokens leaves room for {room}",
                      field=field, value=max_tokens, allowed=f"at most {room}")  # fmt: skip
    limit_reply(params, room)


def last(message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The head of an answer after which the connection is closed."""
    headers = message.get("headers", [])
    return message if _CLOSE in headers else {**message, "headers": [*headers, _CLOSE]}


def too_large(most: int) -> HttpError:
    """413.

    Args:
        most: bytes that a body may have.
    """
    return HttpError(413, f"The request body is larger than {most} bytes.",
                     reason="body_too_large")  # fmt: skip
