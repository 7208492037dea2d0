"""The OpenAI API: vLLM's own handlers, with steering resolved before they run."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Body, Depends, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeResponse,
)
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.exceptions import VLLMError
from vllm.renderers.chat_utils import has_non_text_content

from server import errors
from server.adapting.leases import HELD
from server.errors import HttpError
from server.requests.models import asked_model
from server.requests.protocol import (
    SteeredChatRequest,
    SteeredCompletionRequest,
    SteeredResponsesRequest,
    TokenizeAny,
    TokenizeMessages,
    refuse_unknown,
)
from server.requests.steered import Steered, summary
from server.requests.steerer import Traits
from server.routes import sse
from server.routes.answers import (
    SteeredChatAnswer,
    SteeredCompletionAnswer,
    SteeredResponsesAnswer,
    answers,
)
from server.routes.strict import StrictRoute
from server.routes.traits import chat_traits, completion_traits, responses_traits
from server.serving import Serving
from server.settings.operating import LimitsConfig
from server.trail import trail
from steering.errors import BadValue
from steering.plan import BASE

router = APIRouter(route_class=StrictRoute)
_JSON = [Depends(validate_json_request)]
_PROMPTS = ("messages", "prompt", "input")
_LAST = ("response.completed", "response.incomplete")
logger = logging.getLogger("coxswain")


def serving(request: Request) -> Serving:
    """The server's parts."""
    found: Serving = request.app.state.serving
    return found


async def _steer(
    request: Any, raw: Request, traits: Callable[[Any, Serving], Traits]
) -> Steered | None:
    """Resolves the request's steering and puts it on board."""
    refuse_unknown(request)
    _text_only(request)
    parts = serving(raw)
    noted = trail()
    noted.method = BASE
    noted.model = parts.steerer.model_of(request.model).name
    asked_model.set(noted.model)
    asked = parts.steerer.resolve(request, raw.scope[HELD])
    if asked is not None:
        name = asked.wish.profile
        noted.method, noted.profile = asked.resolved.plan.method, name or noted.profile
        noted.uses([(one.content.name, one.content.digest) for one in asked.picked])
        profile = parts.profiles.get(name) if name else None
        if profile is not None and hasattr(request, "_template"):
            request._template = profile.chat_template
    _need_template(request, parts)
    asking = traits(request, parts)
    _within(asking, parts.config.limits, request)
    if parts.config.logging.prompts:
        noted.prompt = next((v for f in _PROMPTS if (v := getattr(request, f, None))), None)
    if asked is None:
        return None
    request._steered = await parts.steerer.prepare(asked, asking)
    steered: Steered = request._steered
    if random.random() < parts.config.metrics.report_share:
        steered.measure()
    return steered


def _within(asking: Traits, limits: LimitsConfig, request: Any) -> None:
    """Refuses what is more than one request may ask for; the engine's door looks at the prompt."""
    most, replies = limits.max_output_tokens, asking.n * asking.prompts
    if most is not None and asking.max_tokens is not None and asking.max_tokens > most:
        fields = ("max_completion_tokens", "max_output_tokens", "max_tokens")
        field = next(f for f in fields if getattr(request, f, None) is not None)
        raise BadValue("longer than this server's replies", field=field, value=asking.max_tokens,
                       allowed=f"at most {most}")  # fmt: skip
    if replies > limits.max_replies:
        raise BadValue("more replies than one request may have (prompts times n)", field="n",
                       value=replies, allowed=f"at most {limits.max_replies}")  # fmt: skip


def _text_only(request: Any) -> None:
    """Refuses media before anything looks at them: vLLM's parser would fetch their URLs."""
    for field in ("messages", "input"):
        if has_non_text_content(getattr(request, field, None)):
            raise HttpError(400, f"{field}: the content must be text; this server reads no images, "
                            "audio, video or files", param=field)  # fmt: skip


def _need_template(request: Any, parts: Serving) -> None:
    if hasattr(request, "_template") and request._template is None and not parts.has_template:
        raise HttpError(
            400,
            f"The model {parts.config.name!r} has no chat template. Use /v1/completions, set "
            "`chat.template` in the server's configuration, or use a profile with a "
            "`chat_template`.",
            param="messages",
        )


def _need_parser(request: Any, parts: Serving) -> None:
    """Refuses tools that nothing would call; vLLM does so for chat, not for the Responses API."""
    if request.tools and request.tool_choice != "none" and not parts.config.chat.tool_call_parser:
        raise HttpError(400, "tools: this server's configuration names no "
                        "`chat.tool_call_parser`, so no tool would be called; leave tools out or "
                        'ask for tool_choice "none"', param="tools")  # fmt: skip


def _plain(result: Any) -> Any:
    """VLLM's answer, or its error raised as ours."""
    if isinstance(result, ErrorResponse):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # vLLM makes an answer of it, for a client that has left
        raise errors.from_vllm(result.error.model_dump())
    return result


def _report(steered: Steered | None, parts: Serving) -> dict[str, Any] | None:
    if steered is None or not steered.reporting or not steered.reports:
        return None
    return summary(steered, parts.decode)


async def _answer(
    result: Any, steered: Steered | None, parts: Serving, prompts: int = 1
) -> Response:
    """The response of chat and text completions."""
    result = _plain(result)
    if isinstance(result, AsyncGenerator):
        events = await sse.opened(result)
        if steered is not None and steered.reporting:
            events = sse.with_report(events, lambda: _report(steered, parts))
        return StreamingResponse(events, media_type="text/event-stream")
    with errors.answering():
        content = result.model_dump()
        if (report := _report(steered, parts)) is not None:
            content["steering"] = report
        return JSONResponse(content)


@router.post(
    "/v1/chat/completions", dependencies=_JSON, responses=answers(SteeredChatAnswer, streams=True)
)
@with_cancellation
async def chat_completions(request: SteeredChatRequest, raw_request: Request) -> Response:
    """Chat, steered by the `steering` field or by a profile as the model."""
    steered = await _steer(request, raw_request, chat_traits)
    parts = serving(raw_request)
    result = await parts.chat.create_chat_completion(request, raw_request)
    return await _answer(result, steered, parts)


@router.post(
    "/v1/completions", dependencies=_JSON, responses=answers(SteeredCompletionAnswer, streams=True)
)
@with_cancellation
async def completions(request: SteeredCompletionRequest, raw_request: Request) -> Response:
    """Text completion of one prompt or several, steered like chat."""
    steered = await _steer(request, raw_request, completion_traits)
    parts = serving(raw_request)
    result = await parts.completion.create_completion(request, raw_request)
    return await _answer(result, steered, parts)


@router.post(
    "/v1/responses", dependencies=_JSON, responses=answers(SteeredResponsesAnswer, streams=True)
)
@with_cancellation
async def responses(request: SteeredResponsesRequest, raw_request: Request) -> Response:
    """The Responses API (nothing is stored), steered like chat."""
    steered = await _steer(request, raw_request, responses_traits)
    parts = serving(raw_request)
    _need_parser(request, parts)
    result = _plain(await parts.responses.create_responses(request, raw_request))
    if isinstance(result, AsyncGenerator):
        return StreamingResponse(
            _response_events(result, lambda: _report(steered, parts)),
            media_type="text/event-stream",
        )
    with errors.answering():
        content = result.model_dump(mode="json", by_alias=True)
        if (report := _report(steered, parts)) is not None:
            content["steering"] = report
        return JSONResponse(content)


async def _response_events(
    events: AsyncGenerator[Any, None], report: Callable[[], dict[str, Any] | None]
) -> AsyncGenerator[str, None]:
    """Events of the Responses API; the last one carries the report."""
    try:
        async for event in events:
            kind = getattr(event, "type", "unknown")
            data = event.model_dump(mode="json", by_alias=True)
            if kind in _LAST and (found := report()) is not None:
                data["response"]["steering"] = found
            yield f"event: {kind}\ndata: {json.dumps(data)}\n\n"
    except Exception as error:  # the status is out: what remains is an event
        logger.debug("a stream of the Responses API broke", exc_info=error)
        told = {"type": "error", "code": "server_error", "param": None,
                "message": str(error) if isinstance(error, VLLMError)
                else "The engine could not finish this request."}  # fmt: skip
        yield f"event: error\ndata: {json.dumps(told)}\n\n"


@router.get("/v1/models", responses=answers(ModelList))
async def models(raw_request: Request) -> Response:
    """The base, the profiles and the adapters that the key may use."""
    with errors.answering():
        return JSONResponse((await _models(raw_request)).model_dump())


async def _models(raw_request: Request) -> ModelList:
    parts = serving(raw_request)
    return await parts.models.show(parts.steerer.served())


@router.get("/v1/models/{name:path}", responses=answers(ModelCard))
async def model(name: str, raw_request: Request) -> Response:
    """One of them."""
    for card in (await _models(raw_request)).data:
        if card.id == name:
            return JSONResponse(card.model_dump())
    raise HttpError(404, f"model: no such model (got {name!r})", param="model",
                    code="model_not_found")  # fmt: skip


async def _tokens(
    request: Any, raw: Request, call: Callable[[Any, Request], Awaitable[Any]]
) -> Response:
    parts = serving(raw)
    refuse_unknown(request)
    _text_only(request)
    asked = parts.steerer.model_of(request.model)
    asked_model.set(asked.name)
    if asked.profile is not None and isinstance(request, TokenizeMessages):
        request._template = parts.profiles[asked.profile].chat_template
    _need_template(request, parts)
    result = _plain(await call(request, raw))
    with errors.answering():
        return JSONResponse(result.model_dump())


@router.post("/tokenize", dependencies=_JSON, responses=answers(TokenizeResponse))
async def tokenize(raw_request: Request, request: TokenizeAny = Body()) -> Response:  # noqa: B008
    """Token ids of a text or of messages, by the base's tokenizer."""
    parts = serving(raw_request)
    return await _tokens(request, raw_request, parts.tokenization.create_tokenize)


@router.post("/detokenize", dependencies=_JSON, responses=answers(DetokenizeResponse))
async def detokenize(request: DetokenizeRequest, raw_request: Request) -> Response:
    """The text of token ids, by the base's tokenizer."""
    parts = serving(raw_request)
    return await _tokens(request, raw_request, parts.tokenization.create_detokenize)
