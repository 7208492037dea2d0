"""The OpenAI API: vLLM's own handlers, with steering resolved before they run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Body, Depends, Request
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeResponse,
)
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.renderers.chat_utils import has_non_text_content

from server import errors
from server.context import RequestContext, context_of
from server.errors import HttpError
from server.pieces import json_list
from server.requests.defaults import use_profile, use_system
from server.requests.failures import reading, reading_in
from server.requests.protocol import (
    SteeredChatRequest,
    SteeredCompletionRequest,
    SteeredResponsesRequest,
    TokenizeAny,
    TokenizeMessages,
    refuse_unknown,
)
from server.requests.report import summary
from server.requests.resolved import ParsedRequest, ResolvedRequest
from server.requests.run import RequestEngine
from server.routes import sse
from server.routes.answers import (
    SteeredChatAnswer,
    SteeredCompletionAnswer,
    SteeredResponsesAnswer,
    answers,
)
from server.routes.body import StrictRoute
from server.routes.parse import parse_chat, parse_completion, parse_responses
from server.serving import Serving, for_request
from steering.errors import BadValue

router = APIRouter(route_class=StrictRoute)
_JSON = [Depends(validate_json_request)]
_PROMPTS = ("messages", "prompt", "input")

UNKNOWN_FIELDS = "x-coxswain-unknown-fields"
"""The header by which a request has its unknown fields refused."""


def serving(request: Request) -> Serving:
    """The server's parts."""
    parts: Serving = request.app.state.serving
    return parts


def _dump(result: Any) -> dict[str, Any]:
    content: dict[str, Any] = result.model_dump(mode="json", by_alias=True)
    return content


def _dump_response(result: Any) -> dict[str, Any]:
    return {**_dump(result), "store": False}


@dataclass(frozen=True)
class Api:
    """How an API's requests are read and answered.

    Args:
        served: the serving object of vLLM's that answers them.
        parse: reads a body.
        create: the method of `served` that takes it.
        events: of its streams.
        dump: the JSON of an answer.
    """

    served: Callable[[Serving], Any]
    parse: Callable[[Any, Serving], ParsedRequest]
    create: Callable[[Any, Any, Request], Awaitable[Any]]
    events: Callable[[AsyncGenerator[Any, None], sse.Reports | None], sse.Events]
    dump: Callable[[Any], dict[str, Any]] = _dump


CHAT = Api(lambda parts: parts.chat, parse_chat, OpenAIServingChat.create_chat_completion,
           sse.completion_events)  # fmt: skip
COMPLETIONS = Api(lambda parts: parts.completion, parse_completion,
                  OpenAIServingCompletion.create_completion, sse.completion_events)  # fmt: skip
RESPONSES = Api(lambda parts: parts.responses, parse_responses,
                OpenAIServingResponses.create_responses, sse.response_events,
                _dump_response)  # fmt: skip


async def serve(request: Any, raw: Request, api: Api) -> Response:
    """Resolves a request, has vLLM answer it, and adds the report.

    Args:
        request: the body.
        raw: the HTTP request.
        api: whose it is.
    """
    parts, context = serving(raw), context_of(raw.scope)
    check_fields(request, raw)
    resolved = await resolve(request, api.parse, parts, context)
    handler = for_request(api.served(parts), parts, context.model, resolved.chat_template)
    handler.engine_client = RequestEngine(parts.engine, context, resolved, parts.config.limits)

    def taken() -> bool:
        return bool(context.prompt_tokens)

    with reading(taken):
        result = plain(await api.create(handler, request, raw))
    report = partial(_report, resolved, parts)
    if isinstance(result, AsyncGenerator):
        events = api.events(reading_in(result, taken), report if resolved.reporting else None)
        every_s = parts.config.server.sse_keep_alive_s
        # Nothing is there to be sent before all replies are drawn, or a block is chosen.
        wait = resolved.plan.best is None and resolved.plan.search is None
        return await sse.streamed(events, raw, context, every_s, wait=wait)
    content = api.dump(result)
    if (steering := report()) is not None:
        content["steering"] = steering
    return JSONResponse(content)


def check_fields(request: Any, raw: Request) -> None:
    """Refuses fields that nobody reads, as far as the configuration or a header asks for it."""
    header = raw.headers.get(UNKNOWN_FIELDS)
    if header not in (None, "refuse"):
        raise BadValue("not a value of this header", field=UNKNOWN_FIELDS, value=header,
                       allowed="refuse")  # fmt: skip
    every = header == "refuse" or serving(raw).config.server.unknown_fields == "refuse"
    refuse_unknown(request, every=every)


async def resolve(
    request: Any,
    parse: Callable[[Any, Serving], ParsedRequest],
    parts: Serving,
    context: RequestContext,
) -> ResolvedRequest:
    """What a request asks for; everything of ours is checked after this."""
    _text_only(request)
    if parts.config.logging.prompts:
        context.prompt = next((v for f in _PROMPTS if (v := getattr(request, f, None))), None)
    with reading(lambda: False):
        profile = parts.resolver.profile_of(request.model, request.steering, context.access)
        use_profile(request, profile)
    parsed = parse(request, parts)
    context.fields = parsed.fields
    resolved = await parts.resolver.resolve(parsed, context)
    if not isinstance(request, SteeredCompletionRequest):
        _need_template(resolved.chat_template, parts)
    if random.random() < parts.config.metrics.report_share:
        resolved.measure()
    return resolved


def _text_only(request: Any) -> None:
    """Refuses media before anything looks at them: vLLM's parser would fetch their URLs."""
    for field in ("messages", "input"):
        with reading(lambda: False):
            media = has_non_text_content(getattr(request, field, None))
        if media:
            raise HttpError(400, f"{field}: the content must be text; this server reads no images, "
                            "audio, video or files", param=field)  # fmt: skip


def _need_template(template: str | None, parts: Serving) -> None:
    if template is None and not parts.has_template:
        raise HttpError(
            400,
            f"The model {parts.config.name!r} has no chat template. Use /v1/completions, set "
            "`chat.template` in the server's configuration, or use a profile with a "
            "`chat_template`.",
            param="messages",
        )


def plain(result: Any) -> Any:
    """VLLM's answer, or its error raised as ours."""
    if isinstance(result, ErrorResponse):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # vLLM makes an answer of it, for a client that has left
        raise errors.from_vllm(result.error.model_dump())
    return result


def _report(resolved: ResolvedRequest, parts: Serving) -> dict[str, Any] | None:
    if not resolved.reporting or not resolved.reports:
        return None
    return summary(resolved, parts.decode)


@router.post(
    "/v1/chat/completions", dependencies=_JSON, responses=answers(SteeredChatAnswer, streams=True)
)
@with_cancellation
async def chat_completions(request: SteeredChatRequest, raw_request: Request) -> Response:
    """Chat, steered by the `steering` field or by a profile as the model."""
    return await serve(request, raw_request, CHAT)


@router.post(
    "/v1/completions", dependencies=_JSON, responses=answers(SteeredCompletionAnswer, streams=True)
)
@with_cancellation
async def completions(request: SteeredCompletionRequest, raw_request: Request) -> Response:
    """Text completion of one prompt or several, steered like chat."""
    return await serve(request, raw_request, COMPLETIONS)


@router.post(
    "/v1/responses", dependencies=_JSON, responses=answers(SteeredResponsesAnswer, streams=True)
)
@with_cancellation
async def responses(request: SteeredResponsesRequest, raw_request: Request) -> Response:
    """The Responses API (nothing is stored), steered like chat."""
    return await serve(request, raw_request, RESPONSES)


@router.get("/v1/models", responses=answers(ModelList))
async def models(raw_request: Request) -> Response:
    """The base, the profiles and the adapters that the key may use."""
    parts, names = serving(raw_request), _served(raw_request)
    base = (await parts.models.show(names[:1])).data
    cards = [*base, *names[1:]]

    def shown(card: ModelCard | str) -> dict[str, Any]:
        return (parts.models.card(card) if isinstance(card, str) else card).model_dump()

    return json_list("data", cards, shown, {"object": "list"})


def _served(raw_request: Request) -> list[str]:
    return serving(raw_request).resolver.served(context_of(raw_request.scope).access)


@router.get("/v1/models/{name:path}", responses=answers(ModelCard))
async def model(name: str, raw_request: Request) -> Response:
    """One of them."""
    parts, names = serving(raw_request), _served(raw_request)
    further = [name] if name in names[1:] else []
    for card in (await parts.models.show([*names[:1], *further])).data:
        if card.id == name:
            return JSONResponse(card.model_dump())
    raise HttpError(404, f"model: no such model (got {name!r})", param="model",
                    code="model_not_found")  # fmt: skip


async def _tokens(
    request: Any, raw: Request, create: Callable[[Any, Any, Request], Awaitable[Any]]
) -> Response:
    parts, context = serving(raw), context_of(raw.scope)
    check_fields(request, raw)
    _text_only(request)
    await parts.resolver.load_missing(request.model, (), context.access)
    model = parts.resolver.model_of(request.model, context.access)
    profile = parts.profiles[model.profile] if model.profile else None
    template = profile.chat_template if profile is not None else None
    if isinstance(request, TokenizeMessages):
        use_system(request, profile)
        _need_template(template, parts)
    handler = for_request(parts.tokenization, parts, model.name, template)
    with reading(lambda: False):
        result = plain(await create(handler, request, raw))
    return JSONResponse(result.model_dump())


@router.post("/tokenize", dependencies=_JSON, responses=answers(TokenizeResponse))
async def tokenize(raw_request: Request, request: TokenizeAny = Body()) -> Response:  # noqa: B008
    """Token ids of a text or of messages, by the base's tokenizer."""
    return await _tokens(request, raw_request, ServingTokenization.create_tokenize)


@router.post("/detokenize", dependencies=_JSON, responses=answers(DetokenizeResponse))
async def detokenize(request: DetokenizeRequest, raw_request: Request) -> Response:
    """The text of token ids, by the base's tokenizer."""
    return await _tokens(request, raw_request, ServingTokenization.create_detokenize)
