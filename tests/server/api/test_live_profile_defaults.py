"""A profile's end tokens, sampling and system prompt, for requests that bring none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.api.asking import PROMPT, PROXY
from tests.server.live import CHAT_END as END
from tests.server.live import TEMPLATE, Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

SYSTEM = "Be brief."
SAMPLING = {"temperature": 0, "max_tokens": 5, "repetition_penalty": 1.3, "presence_penalty": 1.5}
MESSAGES = [{"role": "user", "content": "hi"}]
SAID = [{"role": "system", "content": SYSTEM}, *MESSAGES]
SET = {**SAMPLING, "model": "big-chat"}


@pytest.fixture(scope="module")
def profile(server: Server) -> Iterator[str]:
    """One like `big-chat`, with defaults."""
    body = {**PROXY, "chat_template": TEMPLATE, "system": SYSTEM, "sampling": SAMPLING}
    answer = httpx.put(f"{server.url}/admin/profiles/polite", json=body)
    assert answer.status_code == 201, answer.text
    yield "polite"
    server.delete("/admin/profiles/polite")


def ask(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_defaults_are_as_if_the_request_had_brought_them(server: Server, profile: str) -> None:
    for path in ("/v1/chat/completions", "/invocations"):
        found = ask(server, path, {"model": profile, "messages": MESSAGES})
        right = ask(server, path, {**SET, "messages": SAID})
        assert found["choices"] == right["choices"]
        assert found["usage"]["prompt_tokens"] == right["usage"]["prompt_tokens"]
    found = ask(server, "/v1/completions", {"model": profile, "prompt": PROMPT})
    right = ask(server, "/v1/completions", {**SET, "prompt": PROMPT})
    assert found["choices"] == right["choices"]  # no conversation, so no system prompt
    found = ask(server, "/v1/responses", {"model": profile, "input": "hi"})
    given = {**SET, "instructions": SYSTEM, "max_output_tokens": SET["max_tokens"]}
    right = ask(server, "/v1/responses", {**given, "input": "hi"})
    assert found["output"][0]["content"] == right["output"][0]["content"]
    found = ask(server, "/v1/messages", {"model": profile, "messages": MESSAGES, "max_tokens": 5})
    right = ask(server, "/v1/chat/completions", {**SET, "messages": SAID})
    assert found["content"][0]["text"] == right["choices"][0]["message"]["content"]
    found, right = (ask(server, "/tokenize", {"model": model, "messages": messages})
                    for model, messages in ((profile, MESSAGES), ("big-chat", SAID)))  # fmt: skip
    assert found["tokens"] == right["tokens"]
    steered = {"model": "big", "messages": MESSAGES, "steering": profile}
    found = ask(server, "/v1/chat/completions", steered)
    right = ask(server, "/v1/chat/completions", {**SET, "messages": SAID})
    assert found["choices"] == right["choices"]


def test_what_a_request_brings_counts(server: Server, profile: str) -> None:
    own = [{"role": "system", "content": "Be long."}, *MESSAGES]
    asked = {"max_completion_tokens": 3, "repetition_penalty": 1.0, "messages": own}
    found = ask(server, "/v1/chat/completions", {"model": profile, **asked})
    right = ask(server, "/v1/chat/completions", {"model": "big-chat", "temperature": 0, **asked})
    assert found["choices"] == right["choices"]
    assert found["usage"] == right["usage"]


FORCED: dict[str, Any] = {"logit_bias": {str(END): 100}, "temperature": 0, "max_tokens": 6}


@pytest.mark.parametrize(
    ("path", "more"),
    [("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": MESSAGES})],
)
def test_a_reply_ends_where_the_expert_s_own_texts_do(
    server: Server, path: str, more: dict[str, Any]
) -> None:
    found = ask(server, path, {"model": "big-chat", **more, **FORCED})
    assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == (
        "stop",
        1,
    )
    # Asked to go on, or without the expert, there is no such end.
    for changes in ({"ignore_eos": True}, {"steering": {"strength": 0}}):
        found = ask(server, path, {"model": "big-chat", **more, **FORCED, **changes})
        assert found["choices"][0]["finish_reason"] == "length", changes


def test_a_profile_may_name_the_tokens_itself(server: Server) -> None:
    url = f"{server.url}/admin/profiles/ends"
    try:
        for stops, reason in (([7, END], "stop"), ([], "length"), ([7], "length")):
            answer = httpx.put(url, json={**PROXY, "stop_token_ids": stops})
            assert answer.status_code in (200, 201), answer.text
            assert answer.json().get("stop_token_ids", []) == stops
            found = ask(server, "/v1/completions", {"model": "ends", "prompt": PROMPT, **FORCED})
            assert found["choices"][0]["finish_reason"] == reason
        assert httpx.put(url, json=PROXY).json()["stop_token_ids"] == [END]
    finally:
        server.delete("/admin/profiles/ends")


@pytest.mark.parametrize(
    ("document", "field"),
    [({"stop_token_ids": [500]}, "stop_token_ids.0"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
     ({"sampling": {"top_p": 0}}, "sampling.top_p"), ({"sampling": {"topp": 1}}, "sampling.topp"),
     ({"sampling": {"stop": ["x"] * 17}}, "sampling.stop"), ({"system": ""}, "system")],
)  # fmt: skip
def test_defaults_are_checked_when_they_are_put(
    server: Server, document: dict[str, Any], field: str
) -> None:
    answer = httpx.put(f"{server.url}/admin/profiles/bad", json={**PROXY, **document})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(f"profiles.bad.{field}")
