"""Grammars that cannot be served, and streams that give no numbers, on a server of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.api.asking import BAD, GREEDY, PROXY, complete, text
from tests.server.live import Server, document

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "enum": [1, 2]}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


def structured(server: Server, what: dict[str, Any]) -> httpx.Response:
    body = {"model": "big", **GREEDY, "structured_outputs": what}
    return server.post("/v1/completions", body)


def tool(server: Server) -> httpx.Response:
    # A random model would fill its room with the white space that the grammar of tools allows.
    spaces = server.post("/tokenize", {"model": "big", "prompt": " \t\n\r"}).json()["tokens"]
    return server.post(
        "/v1/chat/completions",
        {
            "model": "big-chat",
            "temperature": 0,
            "max_tokens": 100,
            "logit_bias": {str(token): -100 for token in spaces},
            "messages": [{"role": "user", "content": "hi"}],
            "tool_choice": "required",
            "tools": [TOOL],
        },
    )


REFUSED: dict[str, dict[str, Any]] = {
    "regex of a class": {"regex": r"\p{L}{2}"},
    "regex that looks ahead": {"regex": "(?=a)b"},
    "open class": {"regex": "["},
    "pattern of a class": {"json": {"type": "string", "pattern": r"\p{Lu}"}},
    "items as a list": {"json": {"type": "array", "items": [{"type": "string"}]}},
    "a reference to itself": {"json": {"$ref": "#"}},
    "references in a circle": {
        "json": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        }
    },
    "a reference to nothing": {"json": {"$ref": "#/$defs/x"}},
    "a grammar without end": {"grammar": "root ::= root"},
}


def refused(server: Server) -> None:
    for name, what in REFUSED.items():
        answer = structured(server, what)
        assert answer.status_code == 400, (name, answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error", name
        assert "rammar" in error["message"] or "xgrammar" in error["message"], (name, error)
    body = {"model": "big", **GREEDY, "stream": True, "structured_outputs": {"json": {"$ref": "#"}}}
    assert server.post("/v1/completions", body).status_code == 400


def allowed(server: Server) -> None:
    body = {
        "model": "big",
        **GREEDY,
        "ignore_eos": False,
        "structured_outputs": {"choice": ["yes"]},
    }
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == "yes"
    called = tool(server)
    assert called.status_code == 200, called.text
    (call,) = called.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "f"


def test_odd_grammars_first(fresh: Server) -> None:
    refused(fresh)
    allowed(fresh)


def test_odd_grammars_after_others(server: Server) -> None:
    allowed(server)
    refused(server)
    allowed(server)


@pytest.mark.parametrize("what", [{"regex": "[0-9]{3}"}, {"choice": ["zebra", "yes"]}], ids=str)
def test_a_grammar_holds_where_it_forbids_all_that_is_plausible(
    fresh: Server, what: dict[str, Any]
) -> None:
    steering = {"method": "contrastive", "amateur": "chat", "plausibility": 1.0}
    answer = complete(
        fresh, steering, structured_outputs=what, ignore_eos=False, logprobs=1, max_tokens=12
    )
    found = text(answer)
    assert found in ("zebra", "yes") if "choice" in what else (found.isdigit() and len(found) == 3)
    assert all(-1e4 < p <= 0 for p in answer["choices"][0]["logprobs"]["token_logprobs"])


def test_a_bias_that_bans_finds_the_next_id(fresh: Server) -> None:
    steering = {"method": "contrastive", "amateur": "chat", "plausibility": 1.0}
    first = complete(fresh, steering, max_tokens=1, return_token_ids=True)
    best = first["choices"][0]["token_ids"][0]
    second = complete(
        fresh, steering, max_tokens=1, return_token_ids=True, logit_bias={str(best): -100}
    )
    assert second["choices"][0]["token_ids"][0] not in (best, 0)


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"stream": True}], ids=str)
def test_a_stream_that_breaks_later_is_named_and_others_go_on(
    fresh: Server, more: dict[str, Any]
) -> None:
    expected = text(complete(fresh, PROXY))
    body = {"model": "big", **GREEDY, "prompt": [20, BAD, 30], "steering": PROXY, **more}
    answer = fresh.post("/v1/completions", body)
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert error["type"] == "server_error"
    assert "The stream 'plain' gives scores that are NaN or infinite" in error["message"]
    assert text(complete(fresh, PROXY)) == expected


def test_constraints_that_leave_nothing_are_the_callers_fault(fresh: Server) -> None:
    body = {"model": "big", **GREEDY, "allowed_token_ids": [40], "bad_words": []}
    body |= {"structured_outputs": {"regex": "[0-9]{3}"}}
    answer = fresh.post("/v1/completions", body)
    assert answer.status_code == 400, answer.text
    assert "constraints leave no token" in answer.json()["error"]["message"]


def test_a_stream_that_is_broken_at_start_is_not_served(broken: Path) -> None:
    streams = {"chat": {"model": "./chat"}, "nan": {"model": "./nan"}}
    config = document(streams=streams, profiles={}, chat={})
    found = Server(broken, config)
    try:
        assert found.process.wait(240) == 1
    finally:
        found.stop()
    log = found.log.read_text()
    assert "coxswain: The stream 'nan' gives scores that are NaN or infinite" in log
    assert "cannot start" in log and "Traceback" not in log
