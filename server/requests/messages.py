"""Anthropic's Messages API: read as a chat request, answered by vLLM's own class."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import lru_cache
from typing import Any

from fastapi import Request
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
)
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from server.requests.protocol import (
    SteeredChatRequest,
    SteeredCountRequest,
    SteeredMessagesRequest,
)

_CONVERTED = "chat_completion_stream_generator" in vars(AnthropicServingMessages)
"""Whether vLLM's class converts streams inside `create_chat_completion`, as that of 0.33 does."""


class SteeredMessages(AnthropicServingMessages):
    """VLLM's handler, for requests that are chat requests by now."""

    async def to_chat(
        self, request: SteeredMessagesRequest | SteeredCountRequest, template: str | None
    ) -> SteeredChatRequest:
        """The chat request that a request stands for.

        Args:
            request: in Anthropic's form.
            template: the base's chat template for it; None: the server's.

        Raises:
            ValueError: it cannot be read.
        """
        effort = await self._effort(request)
        merge = self._merge_inline_system if template is None else _first_only(template)
        chat = self.to_chat_completion_request(
            request, merge_inline_system=merge, disabled_thinking_effort=effort
        )
        chat.max_completion_tokens = None  # the same as `max_tokens`, whose name clients know
        steered = SteeredChatRequest.model_construct(chat.model_fields_set, **vars(chat))
        steered.steering, steered.adapters = request.steering, request.adapters
        steered.vectors = request.vectors
        steered.top_n_sigma = request.top_n_sigma
        fields = (name for name in type(request).model_fields if request.given(name))
        steered._given = frozenset("stop" if name == "stop_sequences" else name for name in fields)
        return steered

    async def _effort(self, request: SteeredMessagesRequest | SteeredCountRequest) -> Any:
        """What stands for `thinking: {"type": "disabled"}` with this model."""
        resolver = getattr(self, "disabled_thinking_effort_resolver", None)
        if resolver is not None:  # vLLM 0.33
            return await resolver.resolve_for(request)
        disabled = request.thinking is not None and request.thinking.type == "disabled"
        older: Any = self  # 0.32 has this method, 0.33 what is asked for above
        return await older._get_disabled_thinking_effort() if disabled else "none"

    async def answer(
        self, chat: SteeredChatRequest, raw: Request
    ) -> AsyncGenerator[str, None] | AnthropicMessagesResponse | ErrorResponse:
        """The answer in Anthropic's form to a request that `to_chat` made."""
        result = await self.create_chat_completion(chat, raw)
        if isinstance(result, ErrorResponse):
            return result
        if isinstance(result, ChatCompletionResponse):
            _keep_whole_calls(result.choices[0])
            return self.messages_full_converter(result)
        return result if _CONVERTED else self.message_stream_converter(result)

    async def message_stream_converter(
        self, generator: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        """VLLM's events; what ends `generator` is raised behind them."""
        failed: list[Exception] = []

        async def until_error() -> AsyncGenerator[str, None]:
            try:
                async with aclosing(generator):
                    async for event in generator:
                        yield event
            except Exception as error:  # vLLM would make "internal_error" of all of them
                failed.append(error)

        async with aclosing(super().message_stream_converter(until_error())) as events:
            async for event in events:
                yield event
        if failed:
            raise failed[0]

    async def count(self, chat: SteeredChatRequest) -> int | ErrorResponse:
        """Tokens of a request's prompt, as the base reads it."""
        rendered: Any = await self.render_chat_request(chat)
        if isinstance(rendered, ErrorResponse):
            return rendered
        _, (prompt,) = rendered
        return len(prompt["prompt_token_ids"])


def _keep_whole_calls(choice: ChatCompletionResponseChoice) -> None:
    """Makes text of calls that the model broke off, or whose arguments are no object: Anthropic's
    form has no other place for them.
    """
    message = choice.message
    whole = [call for call in message.tool_calls if _is_object(call.function.arguments)]
    if len(whole) == len(message.tool_calls):
        return
    texts = [call.function.arguments for call in message.tool_calls if call not in whole]
    message.content = "".join([message.content or "", *texts])
    message.tool_calls = whole
    if not whole and choice.finish_reason == "tool_calls":
        choice.finish_reason = "stop"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@lru_cache(maxsize=64)
def _first_only(template: str) -> bool:
    """Whether a chat template takes system messages at the beginning only."""
    return bool(SteeredMessages._detect_merge_inline_system(template))
