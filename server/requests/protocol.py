"""vLLM's request models with the fields that are ours."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.renderers import TokenizeParams

from steering.adapter_ref import AdapterRef
from steering.errors import BadValue
from steering.spec import MOST_ADAPTERS

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


OURS = frozenset({"steering", "adapters", "vectors", "top_n_sigma"})
"""The fields that are ours."""

_LIKE = 0.75
"""From which likeness on, 0 to 1, a field's name is taken for a misspelt one of ours."""


class ReadableMixin(BaseModel):
    """A request whose validators, vLLM's, may trip over what they do not find in it, and put
    defaults into it.
    """

    _given: frozenset[str] = PrivateAttr(frozenset())

    def given(self, field: str) -> bool:
        """Whether the body that came has a field; null is as good as nothing."""
        return field in self._given

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, body: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """VLLM's validators, some of which run before the types are checked."""
        try:
            fields = frozenset(name for name, value in body.items() if value is not None)
            request = read(body)
            request._given = fields
            return request
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"a part of the request is empty, missing or of the wrong type: {error}"
            ) from error


class SteeringMixin(ReadableMixin):
    """The fields that are ours."""

    # The real schema needs the installed methods; `server.routes.openapi` puts it in. The value is
    # checked by `server.requests.resolve`, whose errors name the field, the value and the range.
    steering: Any = Field(
        None,
        description="Steering for this request: a profile's name, or a method with its options. "
        "With a profile as the model, an object overrides the profile's options.",
    )
    adapters: Annotated[list[AdapterRef], Field(max_length=MOST_ADAPTERS)] | None = Field(
        None,
        description="Adapters for this request, with weights; beside the one that `model` may "
        "name.",
    )
    vectors: Annotated[list[Any], Field(max_length=MOST_ADAPTERS)] | None = Field(
        None,
        description="EasySteer's way to name vectors: each stands for an entry of `adapters`, with "
        "`scale` as its weight and `apply` as its `where`. What has no equal there is refused.",
    )
    top_n_sigma: Annotated[float, Field(gt=0, le=100, strict=True)] | None = Field(
        None,
        description="Top-nσ sampling: only tokens are drawn whose score is at least the largest "
        "less n standard deviations of the scores. Of the steered scores, behind penalties.",
    )


class SteeredChatRequest(SteeringMixin, ChatCompletionRequest):
    """Body of POST /v1/chat/completions."""


class SteeredCompletionRequest(SteeringMixin, CompletionRequest):
    """Body of POST /v1/completions."""


class SteeredResponsesRequest(SteeringMixin, ResponsesRequest):
    """Body of POST /v1/responses."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """Null means that a field is absent; vLLM's answer repeats some that must not be null."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    conversation: Any = Field(
        None, description="Refused, as `previous_response_id` and `background`: nothing is stored."
    )

    def build_tok_params(self, model_config: Any) -> TokenizeParams:
        """As for chat: the template has put the special tokens in, and vLLM's class would have
        the tokenizer add them again.
        """
        return replace(super().build_tok_params(model_config), add_special_tokens=False)


class SteeredMessagesRequest(SteeringMixin, AnthropicMessagesRequest):
    """Body of POST /v1/messages."""

    model_config = ConfigDict(extra="allow")


class SteeredCountRequest(SteeringMixin, AnthropicCountTokensRequest):
    """Body of POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow")


class TokenizeMessages(ReadableMixin, TokenizeChatRequest):
    """Body of POST /tokenize with messages."""


class TokenizeText(ReadableMixin, TokenizeCompletionRequest):
    """Body of POST /tokenize with a text."""


def refuse_unknown(request: BaseModel, *, every: bool) -> None:
    """Refuses fields that nobody would read.

    As with OpenAI and vLLM they are ignored, but for what is written like a field of ours, and for
    the constraints of older vLLMs: the reply would not be steered or constrained, and nothing
    would tell.

    Args:
        request: a body.
        every: whether all of them are refused.

    Raises:
        BadValue: the first such field, with the one that may be meant.
    """
    fields = type(request).model_fields
    for name in sorted((request.model_extra or {}).keys() - HARMLESS):
        ours = _ours(name) if fields.keys() >= OURS else None
        if name.startswith("guided_"):
            ours = "structured_outputs"
        if ours is None and not every:
            continue
        near = difflib.get_close_matches(name, fields, n=1)
        meant = ours or (near[0] if near else None)
        raise BadValue(f"unknown field; did you mean {meant}?" if meant else "unknown field",
                       field=name)  # fmt: skip


def _ours(name: str) -> str | None:
    """Which field of ours a field that is unknown is written like."""
    name = name.lower()
    stems = {"steering": "steer", "adapters": "adapter", "top_n_sigma": "top_n"}
    for field, stem in stems.items():
        if name.startswith(stem) or difflib.SequenceMatcher(None, name, field).ratio() >= _LIKE:
            return field
    return None


TokenizeAny = TokenizeText | TokenizeMessages
SteeredRequest = SteeredChatRequest | SteeredCompletionRequest | SteeredResponsesRequest
