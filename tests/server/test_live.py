"""One real server process, driven over HTTP: every feature, and every bad input of ours."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}
PROMPT = "Water boils at"
IMAGE = [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]}]  # fmt: skip
GREEDY = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


def complete(server: Server, steering: Any = None, **more: Any) -> dict[str, Any]:
    body = {"model": "big", **GREEDY, **more}
    if steering is not None:
        body["steering"] = steering
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text(answer: dict[str, Any], index: int = 0) -> str:
    found: str = answer["choices"][index]["text"]
    return found


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    with httpx.stream("POST", server.url + path, json=body, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        found.append(json.loads(line.removeprefix("data: ")))
    return found


# ---- the start ----------------------------------------------------------------------------


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


def test_the_greeting_says_what_is_served_and_its_curl_line_works(server: Server) -> None:
    log = server.log.read_text()
    for word in (
        "big",
        "chat, plain, twin",
        "big-chat",
        "proxy_tuning",
        "VLLM_USE_V2_MODEL_RUNNER",
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


# ---- prompts of their own -----------------------------------------------------------------


LONG = "Please answer the question in one short sentence. " * 3


def own(prompt: dict[str, Any]) -> dict[str, Any]:
    return {**PROXY, "prompts": {"chat": prompt}}


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": LONG + PROMPT},
        {"chat_template": LONG + "{{ messages[0].content }}"},
        {"messages": [{"role": "user", "content": LONG + PROMPT}]},
        {"token_ids": list(range(10, 80))},
    ],
)
def test_a_stream_reads_its_own_prompt_and_usage_is_the_base_s(
    server: Server, prompt: dict[str, Any]
) -> None:
    plain = complete(server, PROXY)
    steered = complete(server, own(prompt))
    assert text(steered) != text(plain)
    assert steered["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    again = complete(server, own(prompt))
    assert text(again) == text(steered)
    details = again["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] <= again["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_padding_for_a_longer_prompt_is_never_seen(server: Server, stream: bool) -> None:
    body = {"model": "big", **GREEDY, "steering": own({"prompt": LONG + PROMPT}), "stream": stream}

    def choices(**more: Any) -> list[dict[str, Any]]:
        asked = {**body, **more}
        if stream:
            return [c["choices"][0] for c in events(server, "/v1/completions", asked)]
        found: list[dict[str, Any]] = server.post("/v1/completions", asked).json()["choices"]
        return found

    echoed = "".join(choice["text"] for choice in choices(echo=True))
    answer = "".join(choice["text"] for choice in choices())
    assert echoed == PROMPT + answer
    ids = server.post("/tokenize", {"model": "big", "prompt": PROMPT}).json()["tokens"]
    told = [c["prompt_token_ids"] for c in choices(return_token_ids=True)]
    assert [t for t in told if t] == [ids]


def test_the_log_stays_quiet(server: Server) -> None:
    broken: dict[str, Any] = {
        "model": "big-chat", "max_tokens": 40, "temperature": 0, "tool_choice": "required",
        "messages": [{"role": "user", "content": "Row"}],
        "tools": [{"type": "function", "function": {"name": "row"}}],
    }  # fmt: skip
    assert server.post("/v1/chat/completions", broken).status_code == 200
    assert "Traceback" not in server.log.read_text()


def test_the_same_prompt_given_as_its_own_changes_nothing(server: Server) -> None:
    assert text(complete(server, own({"prompt": PROMPT}))) == text(complete(server, PROXY))
    template = {"chat_template": "{{ messages[0].content }}"}
    assert text(complete(server, own(template))) == text(complete(server, PROXY))


def test_batch_prompts_each_get_their_own(server: Server) -> None:
    prompts = [PROMPT, "The old mill beside the bridge"]
    steering = own({"chat_template": LONG + "{{ messages[0].content }}"})
    batch = complete(server, {**steering, "report": True}, prompt=prompts)
    single = [complete(server, steering, prompt=prompt) for prompt in prompts]
    assert [text(batch, 0), text(batch, 1)] == [text(s) for s in single]
    assert [c["index"] for c in batch["steering"]["choices"]] == [0, 1]
    total = sum(s["usage"]["prompt_tokens"] for s in single)
    assert batch["usage"]["prompt_tokens"] == total


def test_a_profile_brings_own_prompts_to_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    answers = [
        client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
        for model in ("own", "big-chat")
    ]
    assert answers[0].choices[0].message.content != answers[1].choices[0].message.content
    usages = [a.usage for a in answers]
    assert usages[0] is not None
    assert usages[1] is not None
    assert usages[0].prompt_tokens == usages[1].prompt_tokens


def test_guidance_with_a_twin(server: Server) -> None:
    found = complete(
        server,
        {"method": "guidance", "negative": "twin", "strength": 2,
         "prompts": {"twin": {"prompt": LONG + PROMPT}}, "report": True},
    )  # fmt: skip
    assert found["steering"]["streams"] == ["twin"]


# ---- reports ------------------------------------------------------------------------------


def test_a_report_says_what_steering_did(server: Server) -> None:
    found = complete(server, {"profile": "big-chat", "report": True})["steering"]
    assert found["method"] == "proxy_tuning"
    assert found["profile"] == "big-chat"
    assert found["strengths"] == {"base": 1.0, "chat": 1.0, "plain": -1.0}
    assert found["streams"] == ["chat", "plain"]
    assert found["tokens"] == 8
    assert found["mean_kl"] > 0
    assert 0 < found["share_changed"] <= 1
    assert found["forward_passes_per_token"]["chat"] == pytest.approx(1, abs=0.3)


def test_a_report_of_the_base_says_nothing_changed(server: Server) -> None:
    found = complete(server, {**PROXY, "strength": 0, "report": True})["steering"]
    assert found["streams"] == []
    assert found["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert found["share_changed"] == 0


def test_token_reports_agree_with_logprobs(server: Server) -> None:
    answer = complete(server, {**PROXY, "report": "tokens"}, logprobs=1, return_token_ids=True)
    (choice,) = answer["steering"]["choices"]
    details = choice["token_details"]
    assert [d["token_id"] for d in details] == answer["choices"][0]["token_ids"]
    reported = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert [d["steered_logprob"] for d in details] == pytest.approx(reported, abs=1e-3)
    assert all(math.isfinite(d["base_logprob"]) and d["kl"] >= -1e-6 for d in details)
    assert sum(d["changed"] for d in details) == pytest.approx(choice["share_changed"] * 8)


def test_reports_of_streams_come_in_one_more_chunk(server: Server) -> None:
    body = {"model": "big-chat", "max_tokens": 6, "stream": True, "temperature": 0,
            "ignore_eos": True, "messages": [{"role": "user", "content": "Hi"}],
            "steering": {"report": "tokens"}}  # fmt: skip
    found = events(server, "/v1/chat/completions", body)
    assert found[-1]["choices"] == []
    assert found[-1]["steering"]["tokens"] == 6
    assert len(found[-1]["steering"]["choices"][0]["token_details"]) == 6
    assert found[-1]["id"] == found[0]["id"]
    assert all("steering" not in chunk for chunk in found[:-1])


def test_reports_with_several_choices(server: Server) -> None:
    found = complete(server, {**PROXY, "report": True}, n=3, temperature=1, seed=1)["steering"]
    assert [c["index"] for c in found["choices"]] == [0, 1, 2]
    assert found["tokens"] == 24


# ---- bad input ----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ('{"steering": {"method": "proxy_tuning", "strength": NaN}}', "steering.strength"),
        ('{"steering": {"method": "mix", "weights": {"chat": 1e999}}}', "steering.weights.chat"),
        ('{"model": "big", "prompt": "a", "temperature": NaN}', "temperature"),
        ('{"model": "big", "prompt": "a", "logit_bias": {"1": Infinity}}', "logit_bias.1"),
        ('{"model": "big", "prompt": "\\ud800"}', "prompt"),
        ('{"model": "big", "prompt": ', None),
    ],
)
def test_what_is_not_json_is_refused(
    server: Server, neighbour: Running, raw: str, param: str | None
) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions", content=raw, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


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


# ---- administration and metrics -----------------------------------------------------------


def test_profiles_over_the_admin_api(server: Server) -> None:
    url = f"{server.url}/admin/profiles/mine"
    profile = {"method": "mix", "weights": {"base": 1, "chat": 0.5}}
    assert httpx.put(url, json=profile).status_code == 201
    assert httpx.put(url, json=profile).status_code == 200
    assert httpx.get(url).json()["origin"] == "admin"
    assert complete(server, model="mine")["model"] == "mine"
    assert "mine" in [card["id"] for card in server.get("/v1/models").json()["data"]]
    assert httpx.delete(url).status_code == 204
    assert httpx.delete(url).status_code == 404
    assert server.post("/v1/completions", {"model": "mine", "prompt": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("name", "profile", "status"),
    [
        ("bad", {"method": "mix", "weights": {"nope": 1}}, 404),
        ("bad", {"method": "mix", "weights": {"chat": 99}}, 400),
        ("bad", {"method": "mix", "weights": {"chat": 1}, "limits": {"weight": [-99, 99]}}, 400),
        ("bad", {"weights": {"chat": 1}}, 400),
        ("bad", [], 400),
        ("bad", {"method": "mix", "weights": {"chat": 1}, "chat_template": "{% for"}, 400),
        ("big", {"method": "mix", "weights": {"chat": 1}}, 409),
        ("big-chat", {"method": "mix", "weights": {"chat": 1}}, 409),
        ("not ok", {"method": "mix", "weights": {"chat": 1}}, 400),
    ],
)
def test_bad_profiles_are_refused(server: Server, name: str, profile: Any, status: int) -> None:
    answer = httpx.put(f"{server.url}/admin/profiles/{name}", json=profile)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_status_streams_and_methods(server: Server) -> None:
    status = server.get("/admin/status").json()
    assert status["status"] == "ready"
    assert status["streams"] == ["chat", "plain", "twin"]
    assert status["max_model_len"] == 224, "the flag wins over the file"
    streams = {s["name"]: s for s in server.get("/admin/streams").json()["streams"]}
    assert streams["chat"]["architecture"] == "Qwen2ForCausalLM"
    assert streams["base"]["passes"] > 0
    methods = {m["name"]: m for m in server.get("/admin/methods").json()["methods"]}
    assert "strength" in methods["proxy_tuning"]["options"]["properties"]


def test_metrics_have_vllm_s_series_and_ours(server: Server) -> None:
    complete(server, "big-chat")
    found = server.get("/metrics").text
    assert "vllm:num_requests_running" in found
    who = 'method="proxy_tuning",profile="big-chat",adapter="none"'
    who = ",".join(sorted(who.split(",")))
    assert f'coxswain_requests_total{{{who},status="200"}}' in found
    assert 'coxswain_stream_tokens_total{stream="chat"}' in found
    assert 'coxswain_stream_passes_total{stream="base"}' in found
    assert "coxswain_request_seconds_bucket" in found
    assert "nope" not in found


def test_a_client_that_leaves_frees_its_request(server: Server) -> None:
    body = {"model": "big", **GREEDY, "max_tokens": 200, "stream": True,
            "steering": {**PROXY, "report": True}}  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    for _ in range(100):
        running = next(
            line for line in server.get("/metrics").text.splitlines()
            if line.startswith("vllm:num_requests_running{")
        )  # fmt: skip
        if float(running.rsplit(" ", 1)[1]) == 0 and server.get("/ready").json()["in_flight"] == 0:
            break
    else:
        pytest.fail("the request is still running")
    assert 'status="499"' in server.get("/metrics").text


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault(server: Server) -> None:
    def left() -> float:
        lines = server.get("/metrics").text.splitlines()
        ours = [line for line in lines if line.startswith("coxswain_requests_total{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in ours if 'status="499"' in line)

    before, log = left(), server.log.read_text()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
        line.sendall(f'{head}Content-Length: 900\r\n\r\n{{"model": '.encode())
        time.sleep(0.2)
    until(lambda: left() > before)
    assert "Traceback" not in server.log.read_text()[len(log) :]
