"""Anthropic's Messages API: the same replies as chat's, in its own shape, streamed or not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.api.asking import PROXY
from tests.server.live import TEMPLATE, Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Who wrote the letter?"}]
BODY: dict[str, Any] = {
    "model": "big-chat", "messages": MESSAGES, "max_tokens": 8, "temperature": 0,
    "steering": {"report": True},
}  # fmt: skip
TOOL = {
    "name": "f", "strict": True,
    "input_schema": {
        "type": "object", "properties": {"x": {"type": "integer", "enum": [1, 2]}},
        "required": ["x"], "additionalProperties": False,
    },
}  # fmt: skip


def ask(server: Server, path: str = "/v1/messages", **changes: Any) -> dict[str, Any]:
    answer = server.post(path, {**BODY, **changes})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def chat(server: Server, **changes: Any) -> dict[str, Any]:
    return ask(server, "/v1/chat/completions", **changes)


def streamed(server: Server, **changes: Any) -> list[dict[str, Any]]:
    """The events of a stream; each says its kind twice."""
    body = {**BODY, "stream": True, **changes}
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    found = []
    for kind, data in zip(lines[::2], lines[1::2], strict=True):
        found.append(json.loads(data.removeprefix("data: ")))
        assert found[-1]["type"] == kind.removeprefix("event: ")
    return found


def words(events: list[dict[str, Any]], kind: str = "text") -> str:
    deltas = [one["delta"] for one in events if one["type"] == "content_block_delta"]
    return "".join(delta.get(kind, "") for delta in deltas)


def refused(answer: httpx.Response, status: int, kind: str, says: str) -> None:
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert found == {"type": "error", "error": {"type": kind, "message": found["error"]["message"]}}
    assert says in found["error"]["message"]


@pytest.mark.parametrize(
    "system", [None, "Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {}}]]
)
def test_a_message_is_a_chat_s_reply(server: Server, system: Any) -> None:
    more = {} if system is None else {"system": system}
    found = ask(server, **more)
    first = [] if system is None else [{"role": "system", "content": "Be brief."}]
    right = chat(server, messages=[*first, *MESSAGES])
    (choice,), usage = right["choices"], right["usage"]
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "big-chat")
    assert found["content"] == [{"type": "text", "text": choice["message"]["content"]}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)
    assert found["usage"]["output_tokens"] == usage["completion_tokens"] == 8
    read = found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"]
    assert read == usage["prompt_tokens"]
    assert found["steering"] == right["steering"]
    counted = ask(server, "/v1/messages/count_tokens", **more, max_tokens=None)
    assert counted == {"input_tokens": usage["prompt_tokens"]}


def test_a_stream_says_the_same(server: Server) -> None:
    right, events = ask(server), streamed(server)
    kinds = [one["type"] for one in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert words(events) == right["content"][0]["text"]
    end = events[-2]
    assert end["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == 8
    assert end["steering"] == right["steering"]
    assert "steering" not in streamed(server, steering=None)[-2]


def test_steering_and_a_stop_sequence_do_what_they_do_in_chat(server: Server) -> None:
    steering = {"profile": "big-chat", "strength": 0.2, "report": True}
    found = ask(server, model="big", steering=steering)
    right = chat(server, model="big", steering=steering)
    text = right["choices"][0]["message"]["content"]
    assert found["content"][0]["text"] == text
    assert found["steering"] == right["steering"]
    assert text != ask(server)["content"][0]["text"]
    cut = ask(server, model="big", steering=steering, stop_sequences=[text[3:5]])
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", text[3:5])


def test_a_tool_is_called_and_what_is_no_call_is_text(server: Server) -> None:
    # A random model would fill its room with the white space that the grammar of tools allows.
    profile = {**PROXY, "chat_template": TEMPLATE, "sampling": {"repetition_penalty": 4}}
    assert httpx.put(f"{server.url}/admin/profiles/caller", json=profile).status_code == 201
    asked: dict[str, Any] = {
        "model": "caller", "tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"},
        "max_tokens": 100,
    }  # fmt: skip
    try:
        (block,) = (found := ask(server, **asked))["content"]
        assert found["stop_reason"] == "tool_use"
        assert (block["type"], block["name"]) == ("tool_use", "f")
        assert block["input"]["x"] in (1, 2)
        events = streamed(server, **asked)
        start = next(one for one in events if one["type"] == "content_block_start")
        assert start["content_block"]["name"] == "f"
        assert json.loads(words(events, "partial_json")) == block["input"]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        # What came of it is the next request's.
        result = {"type": "tool_result", "tool_use_id": block["id"], "content": "done"}
        more = [*MESSAGES, {"role": "assistant", "content": [block]},
                {"role": "user", "content": [result]}]  # fmt: skip
        assert ask(server, messages=more, tools=[TOOL])["usage"]["output_tokens"] == 8
        cut = ask(server, **{**asked, "max_tokens": found["usage"]["output_tokens"] - 8})
        assert cut["stop_reason"] == "max_tokens"
        assert [one["type"] for one in cut["content"]] == ["text"]
    finally:
        server.delete("/admin/profiles/caller")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_errors_have_anthropic_s_shape(server: Server, path: str, stream: bool) -> None:
    url = {"type": "url", "url": "http://127.0.0.1:9/x.png"}
    image = [{"role": "user", "content": [{"type": "image", "source": url}]}]
    bad, missing = "invalid_request_error", "not_found_error"
    cases: list[tuple[dict[str, Any], int, str, str]] = [
        ({"model": "none"}, 404, missing, "no such model"),
        ({"model": "big", "steering": "none"}, 404, missing, "no such profile"),
        ({"steering": {"strength": 9}}, 400, bad, "steering.strength"),
        ({"steering": {"strenght": 1}}, 400, bad, "steering.strenght"),
        ({"adapters": [{"name": "a"}]}, 400, bad, "no adapters"),
        ({"messages": image}, 400, bad, "must be text"),
        ({"messages": None}, 400, bad, "messages"),
        ({"model": "big"}, 400, bad, "no chat template"),
        ({"steer": 1}, 400, bad, "did you mean steering?"),
    ]
    for changes, status, kind, says in cases:
        refused(server.post(path, {**BODY, "stream": stream, **changes}), status, kind, says)
    refused(httpx.get(server.url + path), 405, bad, "not possible")


def test_what_the_engine_refuses_is_told_before_a_stream_begins(server: Server) -> None:
    body = {**BODY, "stream": True, "temperature": -1}
    refused(server.post("/v1/messages", body), 400, "invalid_request_error", "temperature")
