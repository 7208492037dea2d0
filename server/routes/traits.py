"""What steering must know about a request, read from each API's own request class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.entrypoints.openai.responses.utils import construct_input_messages
from vllm.renderers.chat_utils import parse_chat_messages

from server.requests.own_prompts import Conversation
from server.requests.protocol import (
    SteeredChatRequest,
    SteeredCompletionRequest,
    SteeredResponsesRequest,
)
from server.requests.steerer import Traits
from server.serving import Serving


def _conversation(messages: Any, parts: Serving, options: Mapping[str, Any]) -> Conversation:
    """Messages with plain text as their content, the way templates expect them."""
    parsed, _, _ = parse_chat_messages(messages, parts.engine.model_config, "string")
    return Conversation(parsed, options)


def chat_traits(request: SteeredChatRequest, parts: Serving) -> Traits:
    """Of a chat request."""
    options: dict[str, Any] = {
        **(request.chat_template_kwargs or {}),
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
    }
    if request.tools:
        options["tools"] = [tool.model_dump() for tool in request.tools]
    for key in ("chat_template", "tokenize"):
        options.pop(key, None)
    asked = request.max_completion_tokens
    return Traits(
        conversations=lambda: [_conversation(request.messages, parts, options)],
        max_tokens=asked if asked is not None else request.max_tokens,
        n=request.n or 1,
        beam_search=bool(request.use_beam_search),
        prompt_logprobs=request.prompt_logprobs is not None
        or bool(request.echo and request.logprobs),
    )


def completion_traits(request: SteeredCompletionRequest, parts: Serving) -> Traits:
    """Of a text completion: each prompt is one message of a user."""

    def conversations() -> list[Conversation | None]:
        texts = [_text(prompt, parts) for prompt in _prompts(request.prompt)]
        return [
            None if text is None else Conversation([{"role": "user", "content": text}])
            for text in texts
        ]

    return Traits(
        conversations=conversations,
        max_tokens=request.max_tokens if "max_tokens" in request.model_fields_set else None,
        n=request.n or 1,
        prompts=len(_prompts(request.prompt)),
        beam_search=bool(request.use_beam_search),
        prompt_logprobs=request.prompt_logprobs is not None
        or bool(request.echo and request.logprobs is not None),
    )


def responses_traits(request: SteeredResponsesRequest, parts: Serving) -> Traits:
    """Of a request to the Responses API."""

    def conversations() -> list[Conversation | None]:
        messages = construct_input_messages(
            request_instructions=request.instructions, request_input=request.input
        )
        return [_conversation(messages, parts, {"add_generation_prompt": True})]

    return Traits(
        conversations=conversations,
        max_tokens=request.max_output_tokens,
    )


def _prompts(prompt: Any) -> Sequence[Any]:
    """The prompts of a text completion, one by one."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]


def _text(prompt: Any, parts: Serving) -> str | None:
    if isinstance(prompt, str):
        return prompt
    try:
        return str(parts.engine.renderer.tokenizer.decode(list(prompt or ())))
    except (TypeError, ValueError, OverflowError, IndexError):
        return None  # ids that are no tokens: vLLM refuses the prompt itself
