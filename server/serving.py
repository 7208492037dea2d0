"""The objects that routes use, built after the engine: vLLM's serving classes and our own parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

from server.adapting.service import Adapters
from server.engine_vllm import SteeredLLM
from server.operation.rate_limits import RateLimits
from server.operation.state import ServerState
from server.requests.failures import raise_again
from server.requests.messages import SteeredMessages
from server.requests.models import SteeredModels
from server.requests.own_prompts import OwnPrompts, Reader
from server.requests.profiles import Profiles
from server.requests.resolve import Resolver
from server.requests.sandbox import Sandbox
from server.settings.config import Config
from server.settings.operating import Rate
from steering.method import Snapshot
from steering.plugins import Registry

V = TypeVar("V")


class StreamCounters:
    """The worker's cumulative counters, as last polled."""

    def __init__(self) -> None:
        self.tokens: Mapping[str, int] = {}
        self.passes: Mapping[str, int] = {}
        self.steps = 0

    def update(self, counters: Mapping[str, Any]) -> None:
        """Takes over a poll's answer."""
        self.tokens, self.passes = dict(counters["tokens"]), dict(counters["passes"])
        self.steps = int(counters["steps"])


@dataclass(frozen=True)
class Serving:
    """Everything a route may use. One per process.

    Args:
        config: the settings.
        state: the server's phase.
        engine: the engine client.
        methods: the installed methods.
        profiles: the profiles.
        resolver: resolves requests.
        models, chat, completion, responses, messages, tokenization: vLLM's serving classes.
        counters: the worker's counters, as last polled.
        streams: what `/admin/streams` shows, by name.
        adapters: the adapters; None: the server has none.
        rates: what callers may take per minute.
    """

    config: Config
    state: ServerState
    engine: SteeredLLM
    methods: Registry
    profiles: Profiles
    resolver: Resolver
    models: SteeredModels
    chat: OpenAIServingChat
    completion: OpenAIServingCompletion
    responses: OpenAIServingResponses
    messages: SteeredMessages
    tokenization: ServingTokenization
    counters: StreamCounters = field(default_factory=StreamCounters)
    streams: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapters: Adapters | None = None
    rates: RateLimits = field(default_factory=lambda: RateLimits(Rate()))

    def decode(self, token_id: int) -> str:
        """The text of one of the base's tokens, with the space that decoding alone may strip."""
        return convert_ids_list_to_tokens(self.engine.renderer.tokenizer, [token_id])[0]

    @property
    def has_template(self) -> bool:
        """Whether chat works without a profile's template."""
        tokenizer = self.engine.renderer.tokenizer
        return self.chat.chat_template is not None or bool(
            getattr(tokenizer, "chat_template", True)
        )


def for_request(serving: V, parts: Serving, model: str | None, template: str | None) -> V:
    """One of vLLM's serving objects as one request sees it; errors inside streams are raised.

    Args:
        serving: the server's; it is not changed.
        parts: the server's.
        model: the profile or adapter that the request names as its model, or None.
        template: the base's chat template for it; None: the server's.
    """
    handler: Any = copy.copy(serving)
    handler.models = parts.models.for_request(model)
    handler.create_streaming_error_response = raise_again
    handler._convert_generation_error_to_streaming_response = raise_again
    if template is not None:
        handler.chat_template = template
        if hasattr(handler, "online_renderer"):
            handler.online_renderer = copy.copy(handler.online_renderer)
            handler.online_renderer.chat_template = template
    bound: V = handler
    return bound


def build(
    config: Config,
    state: ServerState,
    engine: SteeredLLM,
    methods: Registry,
    profiles: Profiles,
    snapshot: Snapshot,
    readers: Mapping[str, Reader],
    streams: Mapping[str, Mapping[str, Any]],
    adapters: Adapters | None,
    rates: RateLimits,
) -> Serving:
    """Puts the parts together.

    Args:
        config: the settings.
        state: the server's phase.
        engine: up and bound.
        methods: the installed methods.
        profiles: checked.
        snapshot: the streams.
        readers: tokenizers of the streams.
        streams: what `/admin/streams` shows.
        adapters: opened, or None.
        rates: what callers may take per minute.
    """
    own_prompts = OwnPrompts(
        readers,
        engine.model_config.max_model_len - 1,
        config.steering.chat_templates,
        Sandbox(config.server.template_workers),
    )
    resolver = Resolver(
        config.name, methods, profiles, snapshot, config.steering.limits,
        config.steering.inline, own_prompts, adapters, config.limits, config.aliases,
    )  # fmt: skip
    models = SteeredModels(engine, config.name, config.aliases)
    shared: dict[str, Any] = {
        "request_logger": None,
        "chat_template": config.chat.template,
        "chat_template_content_format": config.chat.content_format,
        "default_chat_template_kwargs": config.chat.default_template_kwargs,
    }
    parsers: dict[str, Any] = {
        "enable_auto_tools": config.chat.tool_call_parser is not None,
        "tool_parser": config.chat.tool_call_parser,
        "reasoning_parser": config.chat.reasoning_parser or "",
    }
    renderer = OnlineRenderer(
        model_config=engine.model_config, renderer=engine.renderer, **shared, **parsers
    )
    details = {"online_renderer": renderer, "enable_prompt_tokens_details": True}
    return Serving(
        config=config,
        state=state,
        engine=engine,
        methods=methods,
        profiles=profiles,
        resolver=resolver,
        models=models,
        chat=OpenAIServingChat(engine, models, "assistant", **details, **shared, **parsers),
        completion=OpenAIServingCompletion(engine, models, request_logger=None, **details),
        responses=OpenAIServingResponses(engine, models, **details, **shared, **parsers),
        messages=SteeredMessages(engine, models, "assistant", **details, **shared, **parsers),
        tokenization=ServingTokenization(models, renderer, **shared),
        streams=streams,
        adapters=adapters,
        rates=rates,
    )
