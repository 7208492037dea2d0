"""What tells of the server: its versions, its load, its tokenizer; and SageMaker's way to call it,
whose `/ping` is the gate's.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Discriminator, Field, RootModel, Tag
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.serve.tokenize.protocol import TokenizerInfoResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation
from vllm.version import __version__ as vllm_version

from server.requests.protocol import SteeredChatRequest, SteeredCompletionRequest
from server.routes.answers import SteeredChatAnswer, SteeredCompletionAnswer, answers
from server.routes.body import StrictRoute
from server.routes.openai import CHAT, COMPLETIONS, plain, serve, serving

router = APIRouter(route_class=StrictRoute)

_PATHS = ("_file", "_path")
"""Ends of the names of a tokenizer's settings that say where something lies."""


class Version(BaseModel):
    """The answer of GET /version."""

    version: str = Field(description="vLLM's version: its clients look here.")
    coxswain: str | None


class Load(BaseModel):
    """The answer of GET /load."""

    server_load: int = Field(description="Requests whose answer is not complete.")


def installed(distribution: str) -> str | None:
    """The version of a distribution; None: it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@router.get("/version", responses=answers(Version))
async def version() -> Response:
    """The versions of vLLM and of Coxswain."""
    return JSONResponse({"version": vllm_version, "coxswain": installed("coxswain")})


@router.get("/load", responses=answers(Load))
async def load(raw_request: Request) -> Response:
    """How many requests are under way."""
    return JSONResponse({"server_load": serving(raw_request).state.in_flight})


@router.get("/tokenizer_info", responses=answers(TokenizerInfoResponse))
async def tokenizer_info(raw_request: Request) -> Response:
    """The settings of the base's tokenizer, without those that name a place."""
    parts = serving(raw_request)
    info = plain(await parts.tokenization.get_tokenizer_info()).model_dump(mode="json")
    template = getattr(parts.engine.renderer.tokenizer, "chat_template", None)
    if isinstance(template, str):
        info.setdefault("chat_template", template)
    kind = info["tokenizer_class"]
    for wrapper in ("TokenizerPool", "Cached"):  # vLLM's own
        kind = kind.removeprefix(wrapper)
    info["tokenizer_class"] = kind
    model = parts.engine.model_config
    hidden = {json.dumps(str(place))[1:-1] for place in (model.model, model.tokenizer)}
    return JSONResponse({
        name: value for name, value in info.items()
        if not name.endswith(_PATHS) and not any(place in json.dumps(value) for place in hidden)
    })  # fmt: skip


def _kind(body: Any) -> str:
    """Whether a body is a text completion's or a chat's."""
    if isinstance(body, SteeredCompletionRequest):
        return "SteeredCompletionRequest"
    text = isinstance(body, Mapping) and "prompt" in body and "messages" not in body
    return "SteeredCompletionRequest" if text else "SteeredChatRequest"


class Invocation(
    RootModel[
        Annotated[
            Annotated[SteeredChatRequest, Tag("SteeredChatRequest")]
            | Annotated[SteeredCompletionRequest, Tag("SteeredCompletionRequest")],
            Discriminator(_kind),
        ]
    ]
):
    """Body of POST /invocations."""


@router.post(
    "/invocations",
    dependencies=[Depends(validate_json_request)],
    responses=answers(SteeredChatAnswer | SteeredCompletionAnswer, streams=True),
)
@with_cancellation
async def invocations(request: Invocation, raw_request: Request) -> Response:
    """SageMaker's path: a body with `messages` is a chat, one with `prompt` a text completion."""
    chat = isinstance(request.root, SteeredChatRequest)
    return await serve(request.root, raw_request, CHAT if chat else COMPLETIONS)
