"""Tenants of one server: nothing of one is there for another, by name, cache, or public page."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.keyed.conftest import ADMIN, FULL, LETTERS, LIMITED, METRICS, TEAM
from tests.server.live import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

NOBODY = "zzz"


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())]


def post(server: Server, key: str, path: str, body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=bearer(key), timeout=120)


def get(server: Server, key: str | None, path: str) -> httpx.Response:
    headers = [] if key is None else bearer(key)
    return httpx.get(server.url + path, headers=headers, timeout=60)


# ---- names ----------------------------------------------------------------------------------


def attempts(name: str) -> Iterator[tuple[str, Any]]:
    """(path, body) of everywhere that a name can be put; None: a GET."""
    yield f"/v1/models/{name}", None
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": chat,
        "/v1/messages": chat,
        "/invocations": chat,
        "/v1/completions": {"prompt": "x", "max_tokens": 1},
        "/v1/responses": {"input": "x", "max_output_tokens": 16},
    }
    for path, body in bodies.items():
        for model in (name, f"{name}@1"):
            yield path, {**body, "model": model}
        for steering in (name, {"profile": name}, {"profile": name, "report": True},
                         {"profile": name, "strength": 0.5}):  # fmt: skip
            yield path, {**body, "model": "big", "steering": steering}
        for ref in ({"name": name}, {"name": f"{name}@1"}, {"name": name, "weight": 1e6}):
            yield path, {**body, "model": "big", "adapters": [ref]}
            yield path, {**body, "model": "big", "adapters": [ref], "stream": True}
    yield "/tokenize", {"model": name, "prompt": "x"}
    yield "/detokenize", {"model": name, "tokens": [5]}


def told(server: Server, key: str, name: str, path: str, body: Any) -> tuple[int, str]:
    answer = get(server, key, path) if body is None else post(server, key, path, body)
    return answer.status_code, answer.text.replace(name, "NAME")


@pytest.mark.parametrize(
    ("key", "hidden"),
    [(LIMITED, "big-chat"), (LIMITED, "pack"), (LIMITED, "secret"), (FULL, "secret")],
)
def test_what_a_key_may_not_use_is_answered_as_what_is_not_there(
    keyed: Server, key: str, hidden: str
) -> None:
    for (path, body), (path_no, body_no) in zip(attempts(hidden), attempts(NOBODY), strict=True):
        theirs = told(keyed, key, hidden, path, body)
        assert theirs == told(keyed, key, NOBODY, path_no, body_no), (path, body)
        assert theirs[0] in ((403, 404) if key == LIMITED else (404,)), (path, body, theirs)


def test_no_answer_names_what_a_key_may_not_use(keyed: Server) -> None:
    for key, names in ((LIMITED, ("big-chat", "pack", "secret")), (FULL, ("secret",))):
        pages = [get(keyed, key, path).text for path in ("/v1/models", "/v1/playground")]
        for wrong in ("ow", "secre", "big-cha"):
            for path, body in attempts(wrong):
                answer = get(keyed, key, path) if body is None else post(keyed, key, path, body)
                assert answer.status_code >= 400
                pages.append(answer.text)
        for name in names:
            assert not [page for page in pages if re.search(rf"\b{name}\b", page)]


def test_a_limited_key_takes_its_profile_as_it_is(keyed: Server) -> None:
    body = {"model": "own", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    path = "/v1/chat/completions"
    assert post(keyed, LIMITED, path, {**body, "steering": {"report": True}}).status_code == 200
    for change in ({"strength": 0}, {"expert": "plain"}, {"anti_expert": "chat"},
                   {"prompts": {"chat": {"prompt": "x"}}},
                   {"prompts": {"chat": {"chat_template": "x"}}}, {"method": "mix"}):  # fmt: skip
        for steering in (change, {"profile": "own", **change}, {"report": True, **change}):
            answer = post(keyed, LIMITED, path, {**body, "steering": steering})
            assert answer.status_code == 403, steering
            assert "report" in answer.json()["error"]["message"]
    offers = get(keyed, LIMITED, "/v1/playground").json()
    assert not offers["options"] and offers["methods"] == []
    assert [p["options"] for p in offers["profiles"]] == [{"method": "proxy_tuning"}]


def test_a_private_adapter_is_there_for_its_group_alone(keyed: Server) -> None:
    body = {"model": "secret", "prompt": "x", "max_tokens": 2}
    for key in TEAM:
        assert post(keyed, key, "/v1/completions", body).status_code == 200
        assert "secret" in {card["id"] for card in get(keyed, key, "/v1/models").json()["data"]}
    metrics = get(keyed, METRICS, "/metrics").text
    ours = [line for line in metrics.splitlines() if line.startswith("coxswain_")]
    assert not [line for line in metrics.splitlines() if "secret" in line]
    assert [line for line in ours if 'adapter="private"' in line and "requests_total" in line]
    assert [line for line in ours if 'adapter_name="private"' in line]
    record = get(keyed, ADMIN, "/admin/adapters/secret").json()
    assert record["visible_to"] == ["team"]


def test_a_profile_brings_adapters_that_a_key_may_not_name(keyed: Server) -> None:
    """But not those that are private to a group."""
    plan = {"method": "mix", "weights": {"base": 1.0}}
    for name, adapter in (("open", "pack"), ("closed", "secret")):
        profile = {**plan, "adapters": [{"name": adapter}]}
        url = f"{keyed.url}/admin/profiles/{name}"
        answer = httpx.put(url, json=profile, headers=bearer(ADMIN))
        assert answer.status_code == 201, answer.text
    body = {"prompt": [11, 40, 7], "max_tokens": 2}

    def asked(profile: str, key: str) -> httpx.Response:
        return post(keyed, key, "/v1/completions", {**body, "model": profile})

    assert asked("open", FULL).status_code == 200
    assert asked("closed", TEAM[0]).status_code == 200
    refused = asked("closed", FULL)
    assert refused.status_code == 404 and "secret" not in refused.text
    for name in ("open", "closed"):
        httpx.delete(f"{keyed.url}/admin/profiles/{name}", headers=bearer(ADMIN))


def test_a_replacement_makes_nothing_public(keyed: Server, folders: dict[str, Path]) -> None:
    def load(**more: Any) -> httpx.Response:
        body = {"name": "secret", "source": str(folders["b"]), **more}
        return post(keyed, ADMIN, "/admin/adapters", body)

    assert load().status_code == 202  # it is that already
    assert load(visible_to=[]).status_code == 409
    wrong = load(visible_to=["tema"], replace=True)
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "visible_to.0"
    assert load(replace=True).json()["visible_to"] == ["team"]
    assert "secret" not in get(keyed, FULL, "/v1/models").text
    assert load(replace=True, visible_to=["team", "team"]).json()["visible_to"] == ["team"]


# ---- keys -----------------------------------------------------------------------------------


def test_a_key_has_letters_outside_ascii(keyed: Server) -> None:
    for raw in (LETTERS.encode(), LETTERS.encode("latin-1")):
        headers = [(b"authorization", b"Bearer " + raw)]
        assert httpx.get(f"{keyed.url}/v1/models", headers=headers).status_code == 200


def test_a_host_that_is_none_is_the_caller_s_fault(keyed: Server) -> None:
    for header in ((b"host", b"["), (b"host", b"a:b"), (b"origin", b"http://[")):
        for path in ("/admin/status", "/v1/models", "/nowhere", "/playground"):
            answer = httpx.get(keyed.url + path, headers=[header, *bearer(ADMIN)])
            assert answer.status_code == 400, (path, header)


# ---- the prefix cache -----------------------------------------------------------------------


def cached(server: Server, key: str, ids: list[int], **more: Any) -> int:
    body = {"model": "big", "prompt": ids, "max_tokens": 1, "temperature": 0, **more}
    answer = post(server, key, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] or 0)


STEERED = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"steering": STEERED},
        {"cache_salt": "the client's own"},
        {"adapters": [{"name": "a"}]},
    ],
    ids=["plain", "steered", "salted", "adapted"],
)
def test_a_prompt_is_cached_for_its_group_alone(keyed: Server, more: dict[str, Any]) -> None:
    ids = random.Random(repr(more)).choices(range(10, 400), k=200)
    assert cached(keyed, FULL, ids, **more) == 0
    assert cached(keyed, FULL, ids, **more) > 0
    assert cached(keyed, TEAM[0], ids, **more) == 0, "another key's"
    assert cached(keyed, TEAM[1], ids, **more) > 0, "one of the same group"
    assert cached(keyed, FULL, ids, cache_salt="another") == 0, "the client's own salt"
    if more:
        assert cached(keyed, FULL, ids) == 0, "KV of other streams or adapters"


def test_chat_and_responses_are_kept_apart_too(keyed: Server) -> None:
    for path, field, words in (("/v1/chat/completions", "messages", "chat"),
                               ("/v1/responses", "input", "responses")):  # fmt: skip
        text = " ".join(random.Random(words).choices(["river", "Hello", "stone", "two"], k=60))
        talk = [{"role": "user", "content": text}]
        body: dict[str, Any] = {"model": "big-chat", field: talk, "temperature": 0}
        body |= {"max_output_tokens" if field == "input" else "max_tokens": 1}

        def seen(key: str, path: str = path, body: dict[str, Any] = body) -> int:
            answer = post(keyed, key, path, body)
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]
            details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
            return int(details["cached_tokens"] or 0)

        assert seen(FULL) == 0
        assert seen(FULL) > 0
        assert seen(TEAM[0]) == 0
        assert seen(TEAM[1]) > 0


# ---- public pages ---------------------------------------------------------------------------


def test_no_page_for_callers_has_the_folder_of_a_model(keyed: Server, models: Path) -> None:
    schema = get(keyed, None, "/openapi.json")
    paths = [
        path
        for path, operations in schema.json()["paths"].items()
        if "get" in operations and not path.startswith("/admin") and "{" not in path
    ]
    assert {"/v1/models", "/metrics", "/health", "/ready"} <= set(paths)
    paths += ["/openapi.json", "/docs", "/playground", "/v1/models/big", "/nowhere"]
    pages = {path: get(keyed, METRICS if path == "/metrics" else FULL, path) for path in paths}
    for path, body in attempts("big"):
        if body is not None:
            pages[f"{path} {json.dumps(body)}"] = post(keyed, FULL, path, body)
    for what, answer in pages.items():
        assert answer.status_code < 500, what
        assert str(models) not in answer.text and str(models / "base") not in str(answer.headers)
    assert 'model_name="big"' in pages["/metrics"].text
