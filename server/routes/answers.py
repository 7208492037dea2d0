"""The answers of the routes, for /openapi.json: the steering report, and the bodies around it."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import BaseModel, ConfigDict, Field, with_config
from typing_extensions import TypedDict
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse

_CLOSED = with_config(ConfigDict(extra="forbid"))
"""Reports have the fields below and no others; the tests hold real answers against them."""

_Share = Annotated[
    float | None,
    Field(description="Null where there was no token, or what it compares with did not run."),
]
_Logprob = Annotated[float | None, Field(description="Null where the token is ruled out.")]


@_CLOSED
class Drafts(TypedDict):
    """The drafts of speculation."""

    drafted: int
    accepted: int


@_CLOSED
class StreamChoice(TypedDict):
    """The most likely token of one stream alone."""

    token: str
    token_id: int
    logprob: _Logprob


@_CLOSED
class TokenReport(TypedDict):
    """One token of a reply (`report: tokens`)."""

    token: str
    token_id: int
    base_logprob: _Logprob
    steered_logprob: _Logprob
    kl: Annotated[float | None, Field(description="Steered from base, nats.")]
    base_choice: str
    base_choice_id: int
    changed: bool
    stream_choices: NotRequired[dict[str, StreamChoice]]
    critical_probability: NotRequired[float]
    critical: NotRequired[bool]
    chosen_by: NotRequired[str]
    values: NotRequired[dict[str, float | None]]


@_CLOSED
class DrawReport(TypedDict):
    """One candidate of a round of `guided_search`: a block, or a beam that is complete."""

    beam: Annotated[int, Field(description="Which of the beams kept before it continues.")]
    tokens: Annotated[int, Field(description="Length of the block; 0 of a complete beam.")]
    token_ids: NotRequired[list[int]]
    text_tokens: NotRequired[list[str]]
    score: NotRequired[float | None]
    value: NotRequired[float | None]
    log_ratio: NotRequired[float | None]
    finished: bool


@_CLOSED
class RoundReport(TypedDict):
    """One round of `guided_search`."""

    block: int
    by: Annotated[str, Field(description="draw or fallback.")]
    draws: list[DrawReport]
    kept: Annotated[list[int], Field(description="Which of the draws, first the one that leads.")]
    uniforms: NotRequired[
        Annotated[list[float], Field(description="What chose among the draws, in (0, 1).")]
    ]
    accepted: NotRequired[bool]


@_CLOSED
class ReplyReport(TypedDict):
    """One choice of the answer."""

    index: int
    tokens: int
    forward_passes_per_token: dict[str, _Share]
    mean_kl: _Share
    share_changed: _Share
    speculation: NotRequired[Drafts]
    generated_tokens: NotRequired[int]
    chosen: NotRequired[Annotated[int, Field(description="Which of the drawn replies it is.")]]
    values: NotRequired[
        Annotated[list[float | None], Field(description="What the head said of each drawn reply.")]
    ]
    rounds: NotRequired[list[RoundReport]]
    returned: NotRequired[Annotated[int, Field(description="Which of the beams kept last it is.")]]
    token_details: NotRequired[list[TokenReport]]


@_CLOSED
class AdapterReport(TypedDict):
    """One adapter that the request used."""

    name: str
    version: str
    digest: str | None
    stream: str
    weight: float
    top_k: NotRequired[int]
    temperature: NotRequired[float]
    routed: NotRequired[
        Annotated[dict[str, _Share], Field(description="By member, its share of the tokens.")]
    ]
    invoked: NotRequired[
        Annotated[int, Field(description="Of an aLoRA: prompts that have its invocation tokens; in "
                             "others it does not act.")]
    ]  # fmt: skip


@_CLOSED
class ValuesReport(TypedDict):
    """The additions of value streams."""

    strengths: dict[str, float]
    top_k: int


@_CLOSED
class PhaseReport(TypedDict):
    """What holds in one phase in place of the rest."""

    strengths: dict[str, float]
    values: NotRequired[ValuesReport]


@_CLOSED
class BestReport(TypedDict):
    """The replies among which one was chosen."""

    value: str
    n: int
    generated_tokens: int


@_CLOSED
class SearchReport(TypedDict):
    """How a reply was searched."""

    k: int
    beams: int
    generated_tokens: int
    accepted: NotRequired[int]
    rejected: NotRequired[int]


@_CLOSED
class SteeringReport(TypedDict):
    """How the reply was steered, measured while it was decoded; means are over its tokens."""

    method: str
    profile: NotRequired[str]
    strengths: Annotated[dict[str, float], Field(description="The coefficient of each stream.")]
    values: NotRequired[ValuesReport]
    phases: NotRequired[
        Annotated[list[PhaseReport], Field(description="The method's, then the request's.")]
    ]
    streams: list[str]
    adapters: NotRequired[list[AdapterReport]]
    tokens: int
    forward_passes_per_token: dict[str, _Share]
    mean_kl: Annotated[_Share, Field(description="KL of the steered from the base's, nats.")]
    share_changed: _Share
    speculation: NotRequired[Drafts]
    share_critical: NotRequired[_Share]
    best_of_n: NotRequired[BestReport]
    guided_search: NotRequired[SearchReport]
    choices: NotRequired[list[ReplyReport]]


class SteeredChatAnswer(ChatCompletionResponse):
    """A chat completion; `steering` if the request has a report."""

    steering: SteeringReport = Field(default=None)  # type: ignore[assignment]


class SteeredCompletionAnswer(CompletionResponse):
    """A text completion; `steering` if the request has a report."""

    steering: SteeringReport = Field(default=None)  # type: ignore[assignment]


class SteeredResponsesAnswer(ResponsesResponse):
    """A response; `steering` if the request has a report."""

    steering: SteeringReport = Field(default=None)  # type: ignore[assignment]


class SteeredMessagesAnswer(AnthropicMessagesResponse):
    """A message in Anthropic's form; `steering` if the request has a report."""

    steering: SteeringReport = Field(default=None)  # type: ignore[assignment]


_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def answers(model: Any, *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers 200.

    Args:
        model: of the JSON body.
        streams: server-sent events may come instead.
    """
    response: dict[str, Any] = {"model": model, "description": "The answer."}
    if streams:
        response["content"] = {"text/event-stream": {"itemSchema": _EVENT}}
    return {200: response}


def text(kind: str = "text/plain") -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers 200 with text; its `response_class` is `Response`."""
    return {200: {"description": "The answer.", "content": {kind: {"schema": {"type": "string"}}}}}


ADDED: dict[int | str, dict[str, Any]] = {
    201: {"description": "It is new.", "content": {"application/json": {"schema": {}}}}
}
"""The `responses` of a route that answers 200 for what was there."""


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads its body itself."""
    schema = kind.model_json_schema()
    for name, part in schema.pop("$defs", {}).items():
        _inline(schema, f"#/$defs/{name}", part)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inline(schema: Any, reference: str, part: dict[str, Any]) -> None:
    """Puts a part in the place of its references: a body has no `$defs` of its own."""
    for value in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(value, dict) and value.get("$ref") == reference:
            del value["$ref"]
            value |= part
        elif isinstance(value, dict | list):
            _inline(value, reference, part)
