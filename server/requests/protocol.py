"""vLLM's request models with two more fields: `steering` and `adapters`."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, Field, PrivateAttr
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.sampling_params import SamplingParams

from server.adapting.choice import AdapterWish
from server.requests.steered import Steered
from steering.errors import BadValue
from steering.wire import KEY

MOST_ADAPTERS = 64
"""Adapters of one request; their ranks are limited too."""

HARMLESS = frozenset(
    {
        "metadata", "modalities", "moderation", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier",
        "store", "stream_options", "verbosity",
    }
)  # fmt: skip
"""Fields of the OpenAI API that vLLM does not have and whose absence changes no answer's meaning:
common clients send them."""


class TemplateMixin(BaseModel):
    """A request whose profile may bring the base's chat template."""

    _template: str | None = PrivateAttr(None)

    def build_chat_params(self, default_template: str | None, default_format: Any) -> Any:
        """As vLLM's; the profile's template takes the place of the server's default."""
        return super().build_chat_params(  # type: ignore[misc]
            self._template or default_template, default_format
        )


class SteeringMixin(BaseModel):
    """The field, and the way of its resolved form into the sampling parameters."""

    # The real schema needs the installed methods; `server.routes.openapi` puts it in. The value is
    # checked by `server.requests.steerer`, whose errors name the field, the value and the range.
    steering: Any = Field(
        None,
        description="Steering for this request: a profile's name, or a method with its options. "
        "With a profile as the model, an object overrides the profile's options.",
    )
    adapters: Annotated[list[AdapterWish], Field(max_length=MOST_ADAPTERS)] | None = Field(
        None,
        description="Adapters for this request, with weights; beside the one that `model` may "
        "name.",
    )
    _steered: Steered | None = PrivateAttr(None)

    def to_sampling_params(self, *args: Any, **options: Any) -> SamplingParams:
        """As vLLM's, with the request's steering on board."""
        params = super().to_sampling_params(*args, **options)  # type: ignore[misc]
        if self._steered is not None:
            params.extra_args = {**(params.extra_args or {}), KEY: self._steered}
        return params


class SteeredChatRequest(SteeringMixin, TemplateMixin, ChatCompletionRequest):
    """Body of POST /v1/chat/completions."""


class SteeredCompletionRequest(SteeringMixin, CompletionRequest):
    """Body of POST /v1/completions."""


class SteeredResponsesRequest(SteeringMixin, TemplateMixin, ResponsesRequest):
    """Body of POST /v1/responses."""


class TokenizeMessages(TemplateMixin, TokenizeChatRequest):
    """Body of POST /tokenize with messages."""


def refuse_unknown(request: BaseModel) -> None:
    """Refuses fields that nobody would read.

    vLLM ignores them: a misspelt `steering` or `seed` would go unnoticed.

    Raises:
        BadValue: the first such field, with the one that may be meant.
    """
    known = type(request).model_fields
    for name in sorted((request.model_extra or {}).keys() - HARMLESS):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadValue(f"unknown field{hint}", field=name)


TokenizeAny = TokenizeCompletionRequest | TokenizeMessages
SteeredRequest = SteeredChatRequest | SteeredCompletionRequest | SteeredResponsesRequest
