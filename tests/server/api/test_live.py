"""One real server process, driven over HTTP: its start, and every feature of the OpenAI API."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.api.asking import PROMPT, PROXY, complete, text
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_while_loading_it_is_alive_but_not_ready(server: Server) -> None:
    seen: dict[str, tuple[int, Any, Any]] = {}
    for path, status, body, headers in server.early:
        seen.setdefault(path, (status, body, headers))
    assert seen["/health"][0] == 200
    assert seen["/ready"][0] == 503
    assert any("loading" in body["reason"] for p, _, body, _ in server.early if p == "/ready")
    status, body, headers = seen["/v1/models"]
    assert status == 503
    assert body["error"]["code"] == "starting"
    assert int(headers["retry-after"]) > 0


def test_metrics_answer_while_it_loads(server: Server) -> None:
    """So that `up` tells a server that loads from one that is gone."""
    pages = [(status, body["page"]) for path, status, body, _ in server.early if path == "/metrics"]
    assert len(pages) > 5 and {status for status, _ in pages} == {200}
    assert 'coxswain_phase{phase="starting"} 1.0' in pages[0][1]
    for _, page in pages:
        kinds = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
        assert len(kinds) == len(set(kinds))
    last = server.get("/metrics").text
    assert 'coxswain_phase{phase="ready"} 1.0' in last and "vllm:num_requests_running" in last


def test_the_greeting_says_what_is_served_and_its_curl_line_works(server: Server) -> None:
    log = server.log.read_text()
    for word in (
        "big",
        "chat, plain, twin",
        "big-chat",
        "proxy_tuning",
    ):
        assert word in log
    line = next(line for line in log.splitlines() if line.strip().startswith("try"))
    body = json.loads(line.split("-d '")[1].rstrip("'"))
    path = line.split(f":{server.port}")[1].split()[0]
    assert server.post(path, body).status_code == 200


# ---- what it computes ---------------------------------------------------------------------


def test_strength_0_is_the_base(server: Server) -> None:
    base = complete(server, logprobs=1)
    zero = complete(server, {**PROXY, "strength": 0}, logprobs=1)
    assert zero["choices"][0]["logprobs"] == base["choices"][0]["logprobs"]


def test_proxy_tuning_is_the_mix_it_says_it_is(server: Server) -> None:
    steered = complete(server, PROXY, logprobs=1)
    mixed = complete(
        server, {"method": "mix", "weights": {"base": 1, "chat": 1, "plain": -1}}, logprobs=1
    )
    assert text(steered) != text(complete(server))
    assert text(steered) == text(mixed)
    ours, theirs = (a["choices"][0]["logprobs"]["token_logprobs"] for a in (steered, mixed))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_prefix_caches_of_different_streams_do_not_mix(server: Server) -> None:
    prompt = [10 + i % 400 for i in range(200)]  # more than one block of 128 tokens
    alone = [complete(server, s, prompt=prompt, cache_salt="a") for s in (None, PROXY)]
    again = [complete(server, s, prompt=prompt, cache_salt="a") for s in (None, PROXY)]
    assert [text(a) for a in alone] == [text(a) for a in again]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in again]
    assert cached[0] > 0
    assert cached[1] > 0
    other = complete(server, {"method": "mix", "weights": {"base": 1, "chat": 1}}, prompt=prompt)
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# ---- the OpenAI API -----------------------------------------------------------------------


def test_models_lists_base_and_profiles(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["big", "big-chat", "own"]
    assert client.models.retrieve("big-chat").id == "big-chat"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_a_profile_is_a_model(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model="big-chat", messages=messages, max_tokens=4)
    assert answer.model == "big-chat"
    chunks = list(
        client.chat.completions.create(
            model="big-chat", messages=messages, max_tokens=4, stream=True
        )
    )
    assert {chunk.model for chunk in chunks} == {"big-chat"}


def test_a_profile_by_name_and_with_overrides(server: Server) -> None:
    by_model = complete(server, model="big-chat")
    assert text(by_model) == text(complete(server, "big-chat"))
    assert by_model["model"] == "big-chat"
    zero = {"profile": "big-chat", "strength": 0}
    assert text(complete(server, zero)) == text(complete(server))
    assert text(complete(server, {"strength": 0}, model="big-chat")) == text(complete(server))


def test_streaming_gives_the_same_text(server: Server, client: openai.OpenAI) -> None:
    whole = text(complete(server, PROXY))
    chunks = client.completions.create(
        model="big", stream=True, prompt=PROMPT, max_tokens=8, temperature=0,
        extra_body={"steering": PROXY, "ignore_eos": True},
        stream_options={"include_usage": True},
    )  # fmt: skip
    found = list(chunks)
    assert "".join(c.choices[0].text for c in found if c.choices) == whole
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == 8


def test_n_and_seed(server: Server) -> None:
    draw = {"n": 3, "temperature": 1, "seed": 7, "max_tokens": 6}
    first, second = (complete(server, PROXY, **draw) for _ in range(2))
    texts = [text(first, i) for i in range(3)]
    assert texts == [text(second, i) for i in range(3)]
    assert len(set(texts)) > 1


def test_stop_and_penalties(server: Server) -> None:
    whole = complete(server, PROXY, return_token_ids=True)
    stop = whole["choices"][0]["token_ids"][2]
    cut = complete(server, PROXY, stop_token_ids=[stop], return_token_ids=True)
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"][:3]
    penalised = complete(server, PROXY, max_tokens=40, repetition_penalty=2.0,
                         frequency_penalty=2.0, return_token_ids=True)  # fmt: skip
    ids = penalised["choices"][0]["token_ids"]
    assert len(set(ids)) == len(ids)


def test_logprobs_and_prompt_logprobs(server: Server) -> None:
    found = complete(server, PROXY, logprobs=2, prompt_logprobs=1, echo=True)["choices"][0]
    steered = [p for p in found["logprobs"]["token_logprobs"] if p is not None]
    assert all(-50 < p <= 0 for p in steered)
    base = complete(server, logprobs=2, prompt_logprobs=1, echo=True)["choices"][0]
    assert found["prompt_logprobs"] != base["prompt_logprobs"]


def test_json_schema_holds_under_steering(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="big-chat",
        messages=[{"role": "user", "content": "Is water wet?"}],
        max_tokens=120,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema, "strict": True},
        },
    )
    content = answer.choices[0].message.content or ""
    assert json.loads(content)["answer"] in ("yes", "no")


def test_tools_are_accepted_and_a_required_one_is_called(
    server: Server, client: openai.OpenAI
) -> None:
    # A random model would fill its room with the white space that the grammar of tools allows.
    spaces = server.post("/tokenize", {"model": "big", "prompt": " \t\n\r"}).json()["tokens"]
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": "row",
                "strict": True,
                "parameters": {
                    "type": "object",
                    "properties": {"side": {"enum": ["port", "starboard"]}},
                    "required": ["side"],
                    "additionalProperties": False,
                },
            },
        }
    ]
    messages: Any = [{"role": "user", "content": "Row"}]
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model="big-chat", messages=messages, tools=tools, tool_choice=choice, max_tokens=8
        )
        assert answer.choices[0].finish_reason in ("length", "stop", "tool_calls")
    named: Any = {"type": "function", "function": {"name": "row"}}
    answer = client.chat.completions.create(
        model="big-chat", messages=messages, tools=tools, tool_choice=named,
        max_tokens=100, temperature=0, logit_bias={str(token): -100 for token in spaces},
    )  # fmt: skip
    calls = answer.choices[0].message.tool_calls
    assert calls
    function = calls[0].function  # type: ignore[union-attr]
    assert function.name == "row"
    assert json.loads(function.arguments)["side"] in ("port", "starboard")


def test_responses_api(server: Server, client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="big-chat", input="Hello", max_output_tokens=6, temperature=0,
        extra_body={"steering": {"report": True}},
    )  # fmt: skip
    assert answer.model == "big-chat"
    assert answer.steering["method"] == "proxy_tuning"  # type: ignore[attr-defined]
    kinds = []
    for event in client.responses.create(
        model="big-chat", input="Hello", max_output_tokens=6, temperature=0, stream=True
    ):
        kinds.append(event.type)
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_tokenize_and_detokenize(server: Server) -> None:
    found = server.post("/tokenize", {"model": "big", "prompt": PROMPT}).json()
    back = server.post("/detokenize", {"model": "big", "tokens": found["tokens"]}).json()
    assert back["prompt"] == PROMPT
    messages = [{"role": "user", "content": "Hi"}]
    by_profile = server.post("/tokenize", {"model": "big-chat", "messages": messages})
    assert by_profile.status_code == 200
    without = server.post("/tokenize", {"model": "big", "messages": messages})
    assert without.status_code == 400


def test_without_a_template_chat_says_what_to_do(server: Server) -> None:
    answer = server.post(
        "/v1/chat/completions",
        {"model": "big", "messages": [{"role": "user", "content": "Hi"}]},
    )
    assert answer.status_code == 400
    assert "chat_template" in answer.json()["error"]["message"]


def test_the_schema_documents_every_method(server: Server) -> None:
    schema = server.get("/openapi.json").json()
    field = schema["components"]["schemas"]["SteeredChatRequest"]["properties"]["steering"]
    refs = {choice.get("$ref", "").rsplit("/", 1)[-1] for choice in field["anyOf"]}
    assert {"steering_proxy_tuning", "steering_mix", "steering_guidance"} <= refs
    assert all(ref in schema["components"]["schemas"] for ref in refs if ref)
    assert "strength" in schema["components"]["schemas"]["steering_proxy_tuning"]["properties"]
    assert field["examples"]
    answers = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "429", "500"} <= set(answers)
    report = answers["200"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
    assert "steering" in schema["components"]["schemas"][report]["properties"]


def test_the_log_stays_quiet(server: Server) -> None:
    broken: dict[str, Any] = {
        "model": "big-chat", "max_tokens": 40, "temperature": 0, "tool_choice": "required",
        "messages": [{"role": "user", "content": "Row"}],
        "tools": [{"type": "function", "function": {"name": "row"}}],
    }  # fmt: skip
    assert server.post("/v1/chat/completions", broken).status_code == 200
    assert "Traceback" not in server.log.read_text()
