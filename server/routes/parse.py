"""Reads each API's own request class into a `ParsedRequest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.entrypoints.openai.responses.utils import construct_input_messages
from vllm.renderers.chat_utils import parse_chat_messages

from server.adapting.easysteer import refs_of
from server.errors import HttpError
from server.operation.access_log import USABLE_ID
from server.requests.engine_request import refuse_keys
from server.requests.failures import reading
from server.requests.own_prompts import Conversation
from server.requests.protocol import (
    SteeredChatRequest,
    SteeredCompletionRequest,
    SteeredResponsesRequest,
    SteeringMixin,
)
from server.requests.resolved import ParsedRequest
from server.serving import Serving
from server.vllm_words import own_names
from steering.errors import BadValue


def _conversation(messages: Any, parts: Serving, options: Mapping[str, Any]) -> Conversation:
    """Messages with plain text as their content, the way templates expect them."""
    with reading(lambda: False):
        parsed, _, _ = parse_chat_messages(messages, parts.engine.model_config, "string")
    return Conversation(parsed, {**parts.config.chat.default_template_kwargs, **options})


def parse_chat(request: SteeredChatRequest, parts: Serving) -> ParsedRequest:
    """Parses a chat request."""
    options: dict[str, Any] = {
        **(request.chat_template_kwargs or {}),
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
    }
    if request.tools:
        options["tools"] = [tool.model_dump() for tool in request.tools]
    for key in ("chat_template", "tokenize"):
        options.pop(key, None)
    limit = request.max_completion_tokens
    return _parsed(
        request,
        conversations=lambda: [_conversation(request.messages, parts, options)],
        max_tokens=limit if limit is not None else request.max_tokens,
        max_tokens_field="max_tokens" if limit is None else "max_completion_tokens",
        prompt="messages",
        logprobs="top_logprobs",
        n=request.n or 1,
        beam_search=bool(request.use_beam_search),
        prompt_logprobs=request.prompt_logprobs is not None
        or bool(request.echo and request.logprobs),
    )


def parse_completion(request: SteeredCompletionRequest, parts: Serving) -> ParsedRequest:
    """Parses a text completion: each prompt is one message of a user."""

    def conversations() -> list[Conversation | None]:
        defaults = parts.config.chat.default_template_kwargs
        texts = [_text(prompt, parts) for prompt in _prompts(request.prompt)]
        return [
            None if text is None else Conversation([{"role": "user", "content": text}], defaults)
            for text in texts
        ]

    return _parsed(
        request,
        conversations=conversations,
        max_tokens=request.max_tokens if request.given("max_tokens") else None,
        n=request.n or 1,
        prompts=len(_prompts(request.prompt)),
        beam_search=bool(request.use_beam_search),
        prompt_logprobs=request.prompt_logprobs is not None
        or bool(request.echo and request.logprobs is not None),
    )


def parse_responses(request: SteeredResponsesRequest, parts: Serving) -> ParsedRequest:
    """Parses a request to the Responses API."""
    _refuse_state(request)
    _need_tools(request, parts)

    def conversations() -> list[Conversation | None]:
        with reading(lambda: False):
            messages = construct_input_messages(
                request_instructions=request.instructions, request_input=request.input
            )
        return [_conversation(messages, parts, {"add_generation_prompt": True})]

    return _parsed(
        request,
        conversations=conversations,
        max_tokens=request.max_output_tokens,
        max_tokens_field="max_output_tokens",
        prompt="input",
        logprobs="top_logprobs",
    )


def _parsed(
    request: SteeringMixin,
    *,
    prompt: str = "prompt",
    max_tokens_field: str = "max_tokens",
    logprobs: str = "logprobs",
    **more: Any,
) -> ParsedRequest:
    """What all APIs have.

    Args:
        request: as it came.
        prompt: what its API calls it.
        max_tokens_field: what its API calls `max_tokens`.
        logprobs: what its API calls the number of log-probabilities.
        more: further fields of the result.

    Raises:
        BadValue: the place in which plans travel is taken, or the id would break log lines.
    """
    body: Any = request
    refuse_keys(body.vllm_xargs)
    if "request_id" in body.model_fields_set and not USABLE_ID.fullmatch(body.request_id):
        raise BadValue("it cannot be written into logs", field="request_id",
                       value=body.request_id, allowed=USABLE_ID.pattern)  # fmt: skip
    adapters = (*(request.adapters or ()), *refs_of(request.vectors or ()))
    return ParsedRequest(
        body.model, request.steering, adapters, max_tokens_field=max_tokens_field,
        fields=own_names(prompt, max_tokens_field, logprobs), top_n_sigma=request.top_n_sigma,
        **more,
    )  # fmt: skip


def _refuse_state(request: SteeredResponsesRequest) -> None:
    """Refuses what needs earlier or later requests: nothing is stored here.

    `store` alone is no reason: true is its default, so clients send it without a thought, and the
    response says `"store": false`.
    """
    for name in ("background", "conversation", "previous_input_messages", "previous_response_id"):
        if getattr(request, name, None):
            raise HttpError(400, f"{name}: this server stores no responses; send the whole "
                            "conversation as `input`, and read the answer or its stream",
                            param=name)  # fmt: skip


_CALLED = ("function", "custom", "namespace")
"""Types of tools that the client itself runs. This server runs none."""


def _need_tools(request: Any, parts: Serving) -> None:
    """Refuses tools that nothing would call, and choices among them that nothing would enforce.
    For chat vLLM does so; for the Responses API it ignores both.
    """
    for index, tool in enumerate(request.tools):
        if tool.type not in _CALLED:
            raise HttpError(400, f"tools.{index}.type: this server runs no tools of its own (got "
                            f"{tool.type!r}); allowed: {', '.join(_CALLED)}",
                            param=f"tools.{index}.type")  # fmt: skip
    choice = request.tool_choice
    if not isinstance(choice, str) and choice.type not in ("function", "custom"):
        raise HttpError(400, f"tool_choice.type: not enforced by this server (got "
                        f"{choice.type!r}); allowed: none, auto, required, or one function",
                        param="tool_choice.type")  # fmt: skip
    if request.tools and request.tool_choice != "none" and not parts.config.chat.tool_call_parser:
        raise HttpError(400, "tools: this server's configuration names no "
                        "`chat.tool_call_parser`, so no tool would be called; leave tools out or "
                        'ask for tool_choice "none"', param="tools")  # fmt: skip


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
