"""Every bad input of ours, beside a stream that must not notice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.api.asking import GREEDY, IMAGE, PROXY, complete, events, own, text
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


class Running:
    """A long steered stream that runs beside the bad requests."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._body = {"model": "big", **GREEDY, "max_tokens": 200, "stream": True,
                      "steering": PROXY}  # fmt: skip
        self.text = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        chunks = events(self._server, "/v1/completions", self._body)
        self.text = "".join(c["choices"][0]["text"] for c in chunks if c.get("choices"))

    def result(self) -> str:
        self._thread.join(120)
        return self.text


@pytest.fixture(scope="module")
def neighbour(server: Server) -> Iterator[Running]:
    """Runs while the bad inputs below arrive; must not notice them."""
    expected = text(complete(server, PROXY, max_tokens=200))
    running = Running(server)
    yield running
    assert running.result() == expected


BAD_STEERING: list[tuple[Any, int, str | None]] = [
    ({**PROXY, "strength": -1}, 400, "steering.strength"),
    ({**PROXY, "strength": 1e9}, 400, "steering.strength"),
    ({**PROXY, "strength": "much"}, 400, "steering.strength"),
    ({**PROXY, "strenght": 1}, 400, "steering.strenght"),
    ({"method": "proxy_tuning", "expert": "chat"}, 400, "steering.anti_expert"),
    ({**PROXY, "expert": "nope"}, 404, "steering.expert"),
    ({**PROXY, "expert": "plain"}, 400, "steering.anti_expert"),
    ({"method": "nope"}, 404, "steering.method"),
    ({}, 400, "steering.method"),
    ("nope", 404, "steering"),
    (7, 400, "steering"),
    ([], 400, "steering"),
    ({"method": "mix", "weights": {"chat": 99}}, 400, "steering.weights.chat"),
    ({"method": "mix", "weights": {"chat": 0}}, 400, "steering.weights"),
    ({"profile": "big-chat", "strength": 3}, 400, "steering.strength"),
    ({"profile": "big-chat", "method": "mix"}, 400, "steering.method"),
    ({**PROXY, "report": "everything"}, 400, "steering.report"),
    (own({}), 400, "steering.prompts.chat"),
    (own({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}), 400,
     "steering.prompts.chat"),
    (own({"prompt": ""}), 400, "steering.prompts.chat"),
    (own({"prompt": "word " * 300}), 400, "steering.prompts.chat"),
    (own({"token_ids": [1, 500]}), 400, "steering.prompts.chat.token_ids.1"),
    (own({"token_ids": [-1]}), 400, "steering.prompts.chat.token_ids.0"),
    (own({"chat_template": "{% for"}), 400, "steering.prompts.chat.chat_template"),
    (own({"chat_template": "{{ 1 / 0 }}"}), 400, "steering.prompts.chat.chat_template"),
    (own({"chat_template": "{{ ''.__class__.__mro__ }}"}), 400,
     "steering.prompts.chat.chat_template"),
    (own({"chat_template": "{{ 'x' * 10**11 }}"}), 400, "steering.prompts.chat.chat_template"),
    (own({"chat_template": "x" * 70_000}), 400, "steering.prompts.chat.chat_template"),
    ({**PROXY, "prompts": {"twin": {"prompt": "a"}}}, 400, "steering.prompts.twin"),
    ({**PROXY, "prompts": {"base": {"prompt": "a"}}}, 400, "steering.prompts.base"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("steering", "status", "param"), BAD_STEERING)
def test_bad_steering_is_refused_before_anything_runs(
    server: Server, neighbour: Running, steering: Any, status: int, param: str, stream: bool
) -> None:
    body = {"model": "big", **GREEDY, "steering": steering, "stream": stream}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"].startswith(param)


@pytest.mark.parametrize(("steering", "status", "param"), BAD_STEERING)
def test_a_stream_of_responses_refuses_it_before_its_first_byte(
    server: Server, neighbour: Running, steering: Any, status: int, param: str
) -> None:
    body = {"model": "big", "input": "a", "steering": steering, "stream": True}
    answer = server.post("/v1/responses", body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


LONG = "word " * 400
CHAT = {"model": "big-chat", "messages": [{"role": "user", "content": "a"}]}
TOO_LONG = "context_length_exceeded"
STORED = "stores no responses"
EVERY_API: list[tuple[str, dict[str, Any], str | None, str, str]] = [
    ("/v1/responses", {"input": LONG}, "input", TOO_LONG, "maximum context length"),
    ("/v1/completions", {"prompt": LONG}, "prompt", TOO_LONG, "maximum context length"),
    ("/v1/completions", {"prompt": "word " * 5000}, "prompt", TOO_LONG, "maximum context length"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages",
     TOO_LONG, "maximum context length"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 500}, "max_tokens", TOO_LONG, "500"),
    ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 500}, "max_completion_tokens",
     TOO_LONG, "max_completion_tokens=500"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 500}, "max_output_tokens", TOO_LONG,
     "max_output_tokens=500"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 200, "steering": own(
        {"prompt": "word " * 60})}, "max_tokens", TOO_LONG, "own prompt"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens",
     "invalid_value", "max_output_tokens must be at least 1"),
    ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 0}, "max_completion_tokens",
     "invalid_value", "max_completion_tokens must be at least 1"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, "max_tokens", "invalid_value",
     "max_tokens must be at least 1"),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 30}, "top_logprobs",
     "invalid_value", "30"),
    ("/v1/responses", {"input": "a", "top_logprobs": 30,
                       "include": ["message.output_text.logprobs"]}, "top_logprobs",
     "invalid_value", "30"),
    ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id",
     "invalid_value", STORED),
    ("/v1/responses", {"input": "a", "conversation": "c"}, "conversation", "invalid_value",
     STORED),
    ("/v1/responses", {"input": "a", "background": True}, "background", "invalid_value", STORED),
    ("/v1/responses", {"input": "a", "previous_input_messages": [{"role": "user"}]},
     "previous_input_messages", "invalid_value", STORED),
    ("/v1/responses", {"input": "a", "tools": [{"type": "web_search_preview"}]}, "tools.0.type",
     "invalid_value", "web_search_preview"),
    ("/v1/responses", {"input": "a", "tools": [{"type": "function", "name": "f",
                                                "parameters": {}}],
                       "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [
                           {"type": "function", "name": "f"}]}}, "tool_choice.type",
     "invalid_value", "allowed_tools"),
    ("/v1/responses", {"input": "a", "logit_bias": {"99999": 1}}, "logit_bias", "invalid_value",
     "99999"),
    ("/v1/responses", {"input": "a", "temperature": -1}, "temperature", "invalid_value", "-1"),
    ("/v1/responses", {"input": "a", "structured_outputs": {"regex": "["}}, None,
     "invalid_value", "egex"),
    ("/v1/responses", {"input": "a", "structured_outputs": {"json": {"$ref": "#"}}},
     "structured_outputs", "invalid_value", "grammar"),
    ("/v1/chat/completions", {**CHAT, "chat_template": "x"}, None, "invalid_value",
     "`chat.template`"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "more", "param", "code", "words"), EVERY_API)
def test_every_api_names_its_own_fields_streamed_or_not(
    server: Server, path: str, more: dict[str, Any], param: str | None, code: str, words: str,
    stream: bool,
) -> None:  # fmt: skip
    answer = server.post(path, {"model": "big-chat", **more, "stream": stream})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "--" not in error["message"] and "VLLM_" not in error["message"]


@pytest.mark.parametrize("store", [True, False, None])
def test_nothing_is_stored_and_the_response_says_so(server: Server, store: bool | None) -> None:
    body: dict[str, Any] = {"model": "big-chat", "input": "a", "max_output_tokens": 2}
    if store is not None:
        body["store"] = store
    assert server.post("/v1/responses", body).json()["store"] is False
    text = server.post("/v1/responses", {**body, "stream": True}).text
    told = [json.loads(one.removeprefix("data: ")) for one in text.splitlines()
            if one.startswith("data: ")]  # fmt: skip
    found = [one["response"]["store"] for one in told if "response" in one]
    assert found == [False] * 3


STRICT = {
    "type": "function", "name": "f", "strict": True,
    "parameters": {"type": "object", "properties": {"x": {"type": "integer", "enum": [1, 2]}},
                   "required": ["x"], "additionalProperties": False},
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "f"}], ids=str)
def test_a_tool_that_must_be_called_is_called(server: Server, choice: Any, stream: bool) -> None:
    spaces = server.post("/tokenize", {"model": "big", "prompt": " \t\n\r"}).json()["tokens"]
    body = {"model": "big-chat", "input": "hi", "temperature": 0, "max_output_tokens": 100,
            "tools": [STRICT], "tool_choice": choice, "stream": stream,
            "logit_bias": {str(token): -100 for token in spaces}}  # fmt: skip
    answer = server.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    response = answer.json() if not stream else json.loads(
        answer.text.strip().rsplit("data: ", 1)[1])["response"]  # fmt: skip
    calls = [one for one in response["output"] if one["type"] == "function_call"]
    assert calls and all(one["name"] == "f" for one in calls)
    assert all(json.loads(one["arguments"])["x"] in (1, 2) for one in calls)


@pytest.mark.parametrize(
    "raw",
    [
        '{"steering": {"method": "proxy_tuning", "strength": NaN}}',
        '{"steering": {"method": "mix", "weights": {"chat": 1e999}}}',
        '{"model": "big", "prompt": "a", "logit_bias": {"1": Infinity}}',
        '{"model": "big", "prompt": "\\ud800"}',
        '{"model": "big", "prompt": ',
    ],
)
def test_what_is_not_json_is_refused(server: Server, neighbour: Running, raw: str) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions", content=raw, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"model": "nope", "prompt": "a"}, 404, "model"),
        ("/v1/completions", {"model": "big"}, 400, None),
        ("/v1/completions", {"model": "big", "prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"model": "big", "prompt": [99999]}, 400, None),
        ("/v1/completions", {"model": "big", "prompt": []}, 400, None),
        ("/v1/completions", {"model": "big", "prompt": "word " * 400}, 400, None),
        ("/v1/completions", {"model": "big", "prompt": "a", "vllm_xargs": {"coxswain": "x"}}, 400,
         "vllm_xargs.coxswain"),
        ("/v1/completions", {"model": "big-chat", "prompt": "a", "use_beam_search": True}, 400,
         "use_beam_search"),
        ("/v1/completions", {"model": "big", "prompt": "a", "prompt_logprobs": 1,
                             "steering": own({"prompt": "b"})}, 400, "steering.prompts"),
        ("/v1/completions", {"model": "big", "prompt": "a", "echo": True, "logprobs": 1,
                             "steering": own({"prompt": "b"})}, 400, "steering.prompts"),
        ("/v1/completions", {"model": "big", "prompt": "a", "max_tokens": 200,
                             "steering": own({"prompt": "word " * 60})}, 400, "max_tokens"),
        ("/v1/completions", {"model": "big", "prompt": "a", "stream": True, "response_format": {
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
         400, None),
        ("/v1/chat/completions", {"model": "big-chat", "messages": []}, 400, None),
        ("/v1/chat/completions", {"model": "big-chat",
                                  "messages": [{"role": "user", "content": 3}]}, 400,
         "messages.0.content"),
        ("/v1/chat/completions", {"model": "big-chat", "messages": "hi"}, 400, "messages"),
        ("/v1/chat/completions", {"model": "big-chat", "chat_template": "x",
                                  "messages": [{"role": "user", "content": "a"}]}, 400, None),
        ("/v1/responses", {"model": "nope", "input": "a"}, 404, "model"),
        ("/v1/responses", {"model": "big-chat", "input": "a", "stream": True,
                           "steering": {"strength": -1}}, 400, "steering.strength"),
        ("/v1/completions", {"model": "big", "prompt": "a", "n": 0}, 400, "n"),
        ("/v1/completions", {"model": "big", "prompt": "a", "n": 129, "temperature": 1}, 400, "n"),
        ("/v1/completions", {"model": "big", "prompt": "a", "sterring": PROXY}, 400, "sterring"),
        ("/v1/chat/completions", {"model": "big-chat", "guided_json": {}, "messages": []}, 400,
         "guided_json"),
        ("/v1/chat/completions", {"model": "big-chat", "messages": IMAGE}, 400, "messages"),
        ("/v1/chat/completions", {"model": "big", "messages": IMAGE}, 400, "messages"),
        ("/v1/responses", {"model": "big-chat", "input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": "http://127.0.0.1:9/x.png"}]}]}, 400, "input"),
        ("/tokenize", {"model": "big-chat", "messages": IMAGE}, 400, "messages"),
        ("/tokenize", {"model": "nope", "prompt": "a"}, 404, "model"),
        ("/nowhere", {}, 404, None),
        ("/health", {}, 405, None),
        ("/v1/models", {}, 405, None),
    ],
)  # fmt: skip
def test_bad_requests_have_one_shape(
    server: Server, neighbour: Running, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param


def test_a_body_that_is_too_large_is_413(server: Server, neighbour: Running) -> None:
    answer = server.post("/v1/completions", {"model": "big", "prompt": "x" * 200_000})
    assert answer.status_code == 413


def test_another_content_type_is_refused(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content="{}",
                        headers={"content-type": "text/plain"})  # fmt: skip
    assert answer.status_code == 400
    assert "error" in answer.json()
