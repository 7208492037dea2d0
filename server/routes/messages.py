"""Anthropic's Messages API, steered like the others."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from server.context import context_of
from server.requests.failures import reading
from server.requests.messages import SteeredMessages
from server.requests.protocol import (
    SteeredChatRequest,
    SteeredCountRequest,
    SteeredMessagesRequest,
)
from server.routes import sse
from server.routes.answers import SteeredMessagesAnswer, answers
from server.routes.body import StrictRoute
from server.routes.openai import Api, check_fields, plain, resolve, serve, serving
from server.routes.parse import parse_chat
from server.serving import for_request

router = APIRouter(route_class=StrictRoute)
_JSON = [Depends(validate_json_request)]


def _dump(result: Any) -> dict[str, Any]:
    """Fields that a block has not are left out; those of the message are there."""
    content: dict[str, Any] = result.model_dump(mode="json", exclude_none=True)
    return {"stop_reason": None, "stop_sequence": None, **content}


MESSAGES = Api(lambda parts: parts.messages, parse_chat, SteeredMessages.answer,
               sse.message_events, _dump)  # fmt: skip


async def _chat(
    request: SteeredMessagesRequest | SteeredCountRequest, raw: Request
) -> SteeredChatRequest:
    """The chat request that a request stands for."""
    check_fields(request, raw)
    parts, access = serving(raw), context_of(raw.scope).access
    profile = parts.resolver.profile_of(request.model, request.steering, access)
    template = profile.chat_template if profile is not None else None
    with reading(lambda: False):
        return await parts.messages.to_chat(request, template)


@router.post(
    "/v1/messages", dependencies=_JSON, responses=answers(SteeredMessagesAnswer, streams=True)
)
@with_cancellation
async def messages(request: SteeredMessagesRequest, raw_request: Request) -> Response:
    """Anthropic's Messages API, steered like chat."""
    return await serve(await _chat(request, raw_request), raw_request, MESSAGES)


@router.post(
    "/v1/messages/count_tokens", dependencies=_JSON, responses=answers(AnthropicCountTokensResponse)
)
@with_cancellation
async def count_tokens(request: SteeredCountRequest, raw_request: Request) -> Response:
    """How many tokens the base's prompt of such a request has."""
    parts, context = serving(raw_request), context_of(raw_request.scope)
    chat = await _chat(request, raw_request)
    resolved = await resolve(chat, parse_chat, parts, context)
    handler = for_request(parts.messages, parts, context.model, resolved.chat_template)
    with reading(lambda: False):
        count = plain(await handler.count(chat))
    return JSONResponse({"input_tokens": count})
