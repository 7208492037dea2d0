"""Own prompts and profiles, without an engine."""

from __future__ import annotations

from typing import Any

import pytest

from server.context import RequestContext
from server.errors import HttpError
from server.requests.own_prompts import Conversation, OwnPrompts, Reader
from server.requests.profiles import MOST, Profiles
from server.requests.report import summary
from server.requests.resolve import Resolver
from server.requests.resolved import ParsedRequest, ResolvedRequest
from server.requests.sandbox import Sandbox
from steering.errors import BadValue, NotFound, SteeringError
from steering.method import Limits, OwnPrompt, Snapshot
from steering.plan import BARE, SteeringPlan
from steering.plugins import discover
from steering.spec import Profile
from tests.models import CHAT_TEMPLATE, make_tokenizer

TOKENIZER: Any = make_tokenizer()
SNAPSHOT = Snapshot({"base": "lm", "chat": "lm", "plain": "lm"})
PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}
SANDBOX = Sandbox()
TALK = Conversation([{"role": "user", "content": "Hello river"}])


def own_prompts(**changes: Any) -> OwnPrompts:
    readers = {
        "chat": Reader(TOKENIZER, 500, True),
        "plain": Reader(TOKENIZER, 490, False),
    }
    return OwnPrompts(readers, 50, **{"sandbox": SANDBOX, **changes})


async def ids_of(prompt: dict[str, Any], stream: str = "chat", **options: Any) -> list[int]:
    found = await own_prompts().token_ids(
        {stream: OwnPrompt(**prompt)}, options.pop("conversation", TALK), **options
    )
    return list(found[stream])


async def test_each_kind_of_prompt_is_rendered_as_documented() -> None:
    template = "A: {{ messages[0].content }}"
    assert TOKENIZER.decode(await ids_of({"chat_template": template})) == "A: Hello river"
    assert await ids_of({"prompt": "Hello"}) == TOKENIZER.encode("Hello")
    assert await ids_of({"token_ids": [7, 8]}) == [7, 8]
    messages = [{"role": "user", "content": "Hi"}]
    rendered = TOKENIZER.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert await ids_of({"messages": messages}) == TOKENIZER.encode(
        rendered, add_special_tokens=False
    )


async def test_messages_take_the_profile_s_template() -> None:
    found = await ids_of(
        {"messages": [{"role": "user", "content": "Hi"}]},
        "plain",
        default_template="B {{ messages[0].content }}",
    )
    assert TOKENIZER.decode(found) == "B Hi"


@pytest.mark.parametrize(
    ("stream", "prompt", "field", "words"),
    [
        ("chat", {"chat_template": "{{ 1 / 0 }}"}, ".chat_template", "ZeroDivisionError"),
        ("chat", {"chat_template": "{% if %}"}, ".chat_template", "does not render"),
        (
            "chat",
            {"chat_template": "{{ messages.__class__.mro() }}"},
            ".chat_template",
            "unsafe",
        ),
        ("chat", {"chat_template": "{{ raise_exception('no') }}"}, ".chat_template", "no"),
        ("chat", {"token_ids": [3, 500]}, ".token_ids.1", "not a token"),
        ("plain", {"token_ids": [495]}, ".token_ids.0", "[0, 489]"),
        ("chat", {"prompt": "river " * 100}, "", "more than it can hold"),
        ("chat", {"prompt": ""}, "", "no tokens"),
        (
            "plain",
            {"messages": [{"role": "user", "content": "a"}]},
            ".messages",
            "no chat template",
        ),
    ],
)
async def test_a_bad_prompt_names_stream_and_field(
    stream: str, prompt: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(BadValue) as caught:
        await ids_of(prompt, stream)
    assert caught.value.field == f"steering.prompts.{stream}{field}"
    assert words in str(caught.value)


async def test_a_template_that_never_ends_is_stopped() -> None:
    loops = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    found = own_prompts()
    with pytest.raises(BadValue, match="more than 2 s"):
        await found.token_ids({"chat": OwnPrompt(chat_template=loops)}, TALK)
    assert await found.token_ids({"chat": OwnPrompt(chat_template="x")}, TALK), "the next one runs"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x'.ljust(10**10) }}",
        (
            "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}"
            "{% endfor %}"
        ),
    ],
)
async def test_a_template_that_takes_all_memory_is_stopped(template: str) -> None:
    found = own_prompts()
    with pytest.raises(BadValue, match=r"too much memory|ran for more than"):
        await found.token_ids({"chat": OwnPrompt(chat_template=template)}, TALK)
    assert await found.token_ids({"chat": OwnPrompt(chat_template="x")}, TALK), "the next one runs"


async def test_a_request_s_template_sees_what_the_tokenizer_s_own_would() -> None:
    own = await ids_of({"chat_template": "{{ bos_token }}" + CHAT_TEMPLATE})
    text = TOKENIZER.apply_chat_template(
        TALK.messages, chat_template="{{ bos_token }}" + CHAT_TEMPLATE, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert text.startswith("<s>")
    assert own == TOKENIZER.encode(text, add_special_tokens=False)


async def test_templates_of_requests_can_be_forbidden_but_not_the_profile_s() -> None:
    prompts = {"chat": OwnPrompt(chat_template="x")}
    strict = own_prompts(chat_templates=False)
    with pytest.raises(BadValue, match="from profiles only"):
        await strict.token_ids(prompts, TALK)
    assert await strict.token_ids(prompts, TALK, trusted=True)


def profiles(**configured: dict[str, Any]) -> Profiles:
    return Profiles(
        {name: Profile(**spec) for name, spec in configured.items()},
        base_name="big",
        methods=discover(),
        snapshot=SNAPSHOT,
        limits=Limits(),
    )


def test_replies_end_where_the_expert_s_texts_do_and_not_the_anti_expert_s() -> None:
    found = Profiles(
        {"own": Profile(**PROXY)},
        base_name="big",
        methods=discover(),
        snapshot=SNAPSHOT,
        limits=Limits(),
        end_tokens={"chat": (7, 3), "plain": (9,)},
    )
    assert found.stop_token_ids("own") == (3, 7)


def test_profiles_come_and_go_but_the_configuration_s_stay() -> None:
    found = profiles(fixed=PROXY)
    assert found.put("mine", PROXY)
    assert not found.put("mine", {**PROXY, "strength": 2})
    assert list(found) == ["fixed", "mine"]
    assert (found.origin("fixed"), found.origin("mine")) == ("config", "admin")
    found.delete("mine")
    assert list(found) == ["fixed"]
    for refused in (lambda: found.put("fixed", PROXY), lambda: found.delete("fixed"),
                    lambda: found.put("big", PROXY)):  # fmt: skip
        with pytest.raises(HttpError) as caught:
            refused()
        assert caught.value.status == 409
    with pytest.raises(NotFound):
        found.delete("mine")


def test_profiles_are_checked_and_counted() -> None:
    found = profiles()
    for bad in ({"method": "nope"}, {**PROXY, "expert": "x"}, {**PROXY, "strength": -1}, {}, 7):
        with pytest.raises(SteeringError):
            found.put("bad", bad)
    for number in range(MOST):
        found.put(f"p{number}", PROXY)
    with pytest.raises(HttpError):
        found.put("one-more", PROXY)


def resolver(inline: bool = True, **configured: dict[str, Any]) -> Resolver:
    methods = discover()
    return Resolver("big", methods, profiles(**configured), SNAPSHOT, Limits(), inline,
                    own_prompts())  # fmt: skip


async def resolved(
    steering: Any = None,
    *talks: Conversation | None,
    model: str | None = "big",
    found: Resolver | None = None,
    **more: Any,
) -> ResolvedRequest:
    parsed = ParsedRequest(model, steering, (), lambda: talks or (TALK,), **more)
    return await (found or resolver()).resolve(parsed, RequestContext())


async def test_each_prompt_of_a_batch_gets_its_own_rendering() -> None:
    talks = [Conversation([{"role": "user", "content": c}]) for c in ("one", "two")]
    template = {"prompts": {"chat": {"chat_template": "<{{ messages[0].content }}>"}}}
    found = await resolved({**PROXY, **template}, *talks)
    texts = [TOKENIZER.decode(dict(plan.prompts)["chat"]) for plan in found.plans]
    assert texts == ["<one>", "<two>"]
    same = await resolved({**PROXY, "prompts": {"chat": {"prompt": "x"}}}, *talks)
    assert len(same.plans) == 1


async def test_an_unsteered_request_has_the_base_s_plan() -> None:
    found = await resolved()
    assert found.plans == [BARE]
    assert not found.plan.steers and not found.reporting


async def test_unknown_models_are_refused() -> None:
    with pytest.raises(HttpError) as caught:
        await resolved(model="nope")
    assert caught.value.status == 404


async def test_profiles_only_servers_refuse_methods() -> None:
    found = resolver(inline=False, mine=PROXY)
    with pytest.raises(BadValue, match="profiles only"):
        await resolved(PROXY, found=found)
    assert (await resolved("mine", found=found)).plan.steers
    assert (await resolved({"report": True}, model="mine", found=found)).reporting


async def test_combinations_without_meaning_are_refused() -> None:
    with pytest.raises(BadValue, match="use_beam_search"):
        await resolved(PROXY, beam_search=True)
    with pytest.raises(BadValue, match=r"steering\.prompts"):
        await resolved({**PROXY, "prompts": {"chat": {"prompt": "x"}}}, prompt_logprobs=True)


def test_a_summary_adds_up_over_prompts_and_choices() -> None:
    plan = SteeringPlan("mix", (("base", 1.0), ("chat", 0.5)), report="tokens")
    entry = {"token_id": 9, "base_logprob": float("-inf"), "steered_logprob": -1.0, "kl": 0.5,
             "base_choice": 10, "changed": True}  # fmt: skip

    def tally(tokens: int) -> dict[str, Any]:
        return {"tokens": tokens, "kl_sum": 0.5 * tokens, "changed": 1,
                "passes": {"base": tokens, "chat": tokens}, "detail": [entry],
                "drafted": 0, "accepted": 0}  # fmt: skip

    done = ResolvedRequest([plan], n=2)
    done.reports = {1: {"0": tally(2), "1": tally(4)}, 0: {"0": tally(1), "1": tally(1)}}
    found = summary(done, str)
    assert found["tokens"] == 8
    assert found["mean_kl"] == pytest.approx(0.5)
    assert found["share_changed"] == pytest.approx(0.5)
    assert found["forward_passes_per_token"] == {"base": 1.0, "chat": 1.0}
    assert [c["index"] for c in found["choices"]] == [0, 1, 2, 3]
    detail = found["choices"][0]["token_details"][0]
    assert detail["base_logprob"] is None, "JSON has no infinity"
    assert (detail["token"], detail["base_choice"]) == ("9", "10")
