"""Keys: hashed or plain, and what a limited one may use."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from server.access import EVERYTHING, Access
from server.context import RequestContext
from server.errors import HttpError
from server.operation.auth import Auth
from server.requests.failures import http_error
from server.requests.own_prompts import OwnPrompts
from server.requests.profiles import Profiles
from server.requests.resolve import Resolver
from server.requests.resolved import ParsedRequest
from server.settings.config import Config, ConfigInvalid
from server.settings.file import parse
from steering.errors import SteeringError
from steering.method import Limits, Snapshot
from steering.plugins import discover


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def config(**auth: Any) -> Config:
    return parse({"model": "m", "auth": auth, "server": {"host": "0.0.0.0"}}, Path("/nowhere"), {})


def scope_of(path: str, **headers: bytes) -> dict[str, Any]:
    """A request from this machine."""
    raw = [(name.encode(), value) for name, value in headers.items()]
    return {"type": "http", "path": path, "headers": raw, "client": ("127.0.0.1", 5000)}


def check(found: Auth, path: str, key: str) -> Access:
    return found.check(scope_of(path, authorization=f"Bearer {key}".encode()))


def status(found: Auth, path: str, key: str) -> int:
    try:
        check(found, path, key)
    except HttpError as error:
        return error.status
    return 200


def test_a_hashed_key_opens_with_the_key_and_not_with_its_hash() -> None:
    found = Auth(config(api_keys=["plain", hashed("secret")], admin_key=hashed("boss")))
    for key in ("plain", "secret"):
        assert check(found, "/v1/models", key) == EVERYTHING
    for key in (hashed("secret"), hashed("secret")[7:], hashed("plain"), "", "boss", "secre"):
        assert status(found, "/v1/models", key) == 401
    assert status(found, "/admin/status", "boss") == 200
    assert status(found, "/admin/status", "secret") == 403
    assert status(found, "/admin/status", hashed("boss")) == 401


def test_keys_are_not_kept() -> None:
    found = Auth(config(api_keys=["plain-key"], admin_key="boss-key"))
    assert "plain-key" not in repr(vars(found)) and "boss-key" not in repr(vars(found))


@pytest.mark.parametrize("key", ["sha256:12", "sha256:" + "G" * 64, "sha256:", "", "  "])
def test_a_key_that_nobody_could_use_is_refused(key: str) -> None:
    for auth in ({"api_keys": [key]}, {"admin_key": key}, {"api_keys": [{"key": key}]}):
        with pytest.raises(ConfigInvalid, match=r"hex digits|empty"):
            config(**auth)


def test_a_limited_key_knows_its_limits() -> None:
    limited = {"key": hashed("narrow"), "profiles": ["p"], "adapters": ["a"]}
    found = Auth(config(api_keys=["wide", limited, {"key": "closed", "adapters": []}]))
    narrow = check(found, "/v1/chat/completions", "narrow")
    assert narrow == Access(frozenset({"p"}), frozenset({"a"}))
    assert list(narrow.seen_profiles({"q": 1, "p": 2})) == ["p"]
    assert narrow.sees_adapter("a", []) and not narrow.sees_adapter("b", [])
    closed = check(found, "/v1/models", "closed")
    assert closed.steers and list(closed.seen_profiles({"q": 1, "p": 2})) == ["q", "p"]
    assert not closed.sees_adapter("a", [])


def test_a_private_adapter_exists_for_its_groups_alone() -> None:
    team = [{"key": key, "group": "team"} for key in ("t1", "t2")]
    found = Auth(
        config(api_keys=["wide", *team, {"key": "t3", "group": "team", "adapters": ["b"]}])
    )
    wide, first, second, third = (check(found, "/v1/models", k) for k in ("wide", "t1", "t2", "t3"))
    own = "key:" + hashlib.sha256(b"wide").hexdigest()[:8]
    assert (wide.group, first.group) == (own, "team")
    for access, owners, sees in (
        (first, [()], True),
        (first, [("team",)], True),
        (second, [("team", "others")], True),
        (third, [("team",)], False),
        (wide, [("team",)], False),
        (wide, [(own,)], True),
        (EVERYTHING, [("team",)], False),
        (EVERYTHING, [()], True),
        # While it changes hands.
        (first, [("team",), ("others",)], False),
        (first, [("team",), ()], True),
        (wide, [(), ("team",)], False),
    ):
        assert access.sees_adapter("a", owners) is sees, (access.group, owners)


def test_keys_of_a_group_share_a_salt_that_cannot_be_guessed() -> None:
    team = [{"key": key, "group": "team"} for key in ("t1", "t2")]
    settings = config(api_keys=["a", "b", *team])
    found, again = Auth(settings), Auth(settings)
    salts = [check(found, "/v1/models", key).salt for key in ("a", "b", "t1", "t2")]
    assert None not in salts and salts[2] == salts[3] and len(set(salts)) == 3
    assert check(again, "/v1/models", "a").salt != salts[0]
    assert check(Auth(config()), "/v1/models", "a").salt is None
    assert str(salts[0]) not in repr(check(found, "/v1/models", "a"))


@pytest.mark.parametrize("key", ["clé", "voilà", "ключ", "zasadą", "🔑"])
def test_keys_have_letters_outside_ascii(key: str) -> None:
    found = Auth(config(api_keys=[key], admin_key=key + "!"))
    ways = [key.encode()]
    if all(ord(letter) < 256 for letter in key):
        ways.append(key.encode("latin-1"))
    for raw in ways:
        assert found.check(scope_of("/v1/models", authorization=b"Bearer " + raw)).group
        admin = scope_of("/admin/status", authorization=b"Bearer " + raw + b"!")
        assert found.check(admin) == EVERYTHING
        for wrong in (raw[:-1], raw + b"x", raw.decode("latin-1").encode()):
            if wrong in ways:
                continue
            with pytest.raises(HttpError) as caught:
                found.check(scope_of("/v1/models", authorization=b"Bearer " + wrong))
            assert caught.value.status == 401


def test_metrics_are_open_until_a_key_is_limited() -> None:
    narrow = {"key": "narrow", "profiles": ["p"]}
    assert Auth(config(api_keys=["wide"])).check(scope_of("/metrics")) == EVERYTHING
    closed = Auth(config(api_keys=["wide", narrow], admin_key="boss"))
    keyed = Auth(config(api_keys=["wide"], metrics_key="scrape", admin_key="boss"))
    for found in (closed, keyed):
        for key in ("wide", "narrow", "", "boss2"):
            assert status(found, "/metrics", key) == 401
        assert status(found, "/metrics", "boss") == 200
    assert status(keyed, "/metrics", "scrape") == 200
    assert status(keyed, "/admin/status", "scrape") == 401
    assert status(keyed, "/v1/models", "scrape") == 401


LOCAL = ("127.0.0.1", 5000)


def local() -> Auth:
    """Without an admin key, on loopback."""
    return Auth(parse({"model": "m"}, Path("/nowhere"), {}))


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        (LOCAL, {}, 200),
        (("::1", 1), {"host": b"[::1]:8000"}, 200),
        (("::ffff:127.0.0.1", 1), {}, 200),
        (LOCAL, {"origin": b"http://localhost:8000"}, 200),
        (("10.0.0.7", 1), {}, 403),
        (("::ffff:10.0.0.7", 1), {}, 403),
        (None, {}, 403),  # a unix socket
        (LOCAL, {"host": b"evil.example"}, 403),
        (LOCAL, {"host": b"127.0.0.1@evil.example"}, 403),
        (LOCAL, {"origin": b"http://evil.example"}, 403),
        (LOCAL, {"origin": b"null"}, 403),
        *((LOCAL, {name: b"127.0.0.1"}, 403) for name in (
            "forwarded", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-real-ip",
            "via", "cf-connecting-ip", "true-client-ip", "x-forwarded", "x-envoy-external-address",
            "x-amzn-trace-id", "tailscale-user-login",
        )),
        (LOCAL, {"host": b"["}, 400),
        (LOCAL, {"host": b"[::1"}, 400),
        (LOCAL, {"host": b"localhost:port"}, 400),
        (LOCAL, {"host": b"localhost:99999"}, 400),
        (LOCAL, {"origin": b"http://["}, 400),
        (LOCAL, {"origin": b"http://localhost:x"}, 400),
    ],
)  # fmt: skip
def test_without_a_key_administration_is_for_this_machine(
    client: tuple[str, int] | None, headers: dict[str, bytes], status: int
) -> None:
    scope = {
        **scope_of("/admin/status", **{"host": b"localhost:8000", **headers}),
        "client": client,
    }
    if status == 200:
        assert local().check(scope) == EVERYTHING
        return
    with pytest.raises(HttpError) as caught:
        local().check(scope)
    assert caught.value.status == status


def test_a_host_that_is_none_is_refused_on_every_path_and_two_as_well() -> None:
    for path in ("/v1/models", "/metrics", "/playground", "/nowhere"):
        for headers in ({"host": b"["}, {"origin": b"http://[::1"}):
            with pytest.raises(HttpError) as caught:
                local().check(scope_of(path, **headers))
            assert caught.value.status == 400
    twice = scope_of("/admin/status", host=b"localhost")
    twice["headers"].append((b"host", b"evil.example"))
    with pytest.raises(HttpError, match="more than once"):
        local().check(twice)


def asked(model: str | None = None, steering: Any = None) -> ParsedRequest:
    return ParsedRequest(model, steering, (), list)


def resolver() -> Resolver:
    """With two profiles and no engine: nothing here is tokenised."""
    parsed = parse(
        {"model": "m", "streams": {"s": {"model": "x"}},
         "profiles": {name: {"method": "mix", "weights": {"base": 1, "s": 0.5}} for name in "pq"}},
        Path("/nowhere"), {},
    )  # fmt: skip
    methods, snapshot, limits = discover(()), Snapshot({"base": "lm", "s": "lm"}), Limits(
        strength=(0, 10), weight=(-10, 10)
    )  # fmt: skip
    profiles = Profiles(parsed.profiles, base_name="m", methods=methods, snapshot=snapshot,
                        limits=limits)  # fmt: skip
    return Resolver("m", methods, profiles, snapshot, limits, True, cast(OwnPrompts, None))


OWN = {"method": "mix", "weights": {"base": 1, "s": 0.1}}
P = {"profile": "p"}
PROMPTS = {"s": {"chat_template": "x"}}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (asked("m"), 200),
        (asked("p"), 200),
        (asked("m", "p"), 200),
        (asked("m", {**P, "report": True}), 200),
        (asked("p", {"report": "tokens"}), 200),
        (asked("m", {"report": True}), 200),
        (asked("m", {"profile": None, "report": True}), 200),
        (asked("q"), 404),
        (asked("m", "q"), 404),
        (asked("m", {"profile": "q"}), 404),
        (asked("m", {"profile": "q", "report": True}), 404),
        (asked("m", OWN), 403),
        (asked("p", OWN), 403),
        (asked("m", {}), 403),
        (asked("m", {"profile": None}), 403),
        (asked("m", {"method": "nope"}), 403),
        (asked("m", {**P, "weights": {"s": 9}}), 403),
        (asked("p", {"weights": {"s": 9}}), 403),
        (asked("p", {"method": "mix"}), 403),
        (asked("p", {"prompts": PROMPTS}), 403),
        (asked("m", {"profile": "q", "prompts": PROMPTS}), 403),
        (asked("m", {**P, "nonsense": 1}), 403),
    ],
)
async def test_a_limited_key_gets_its_profiles_as_they_are_and_the_plain_base(
    request_: ParsedRequest, status: int
) -> None:
    limited = RequestContext(access=Access(profiles=frozenset({"p"})))
    try:
        await resolver().resolve(request_, limited)
        got = 200
    except (HttpError, SteeringError) as error:
        told = http_error(error)
        got = told.status
        assert not re.search(r"\b(s|mix|proxy_tuning)\b", told.message)
    assert got == status


async def refusal(request_: ParsedRequest) -> tuple[Any, ...]:
    """What a key limited to `p` is told, with the name that it asked for taken out."""
    limited = RequestContext(access=Access(profiles=frozenset({"p"})))
    with pytest.raises((HttpError, SteeringError)) as caught:
        await resolver().resolve(request_, limited)
    told = http_error(caught.value)
    name = re.compile(r"\b(q|z)\b")
    return told.status, told.code, told.param, name.sub("NAME", told.message)


@pytest.mark.parametrize(
    "steering", [None, "{}", {"profile": "{}"}, {"profile": "{}", "report": True},
                 {"profile": "{}", "strength": 2}],
)  # fmt: skip
async def test_another_s_profile_is_answered_as_one_that_nobody_has(steering: Any) -> None:
    def filled(name: str) -> ParsedRequest:
        if steering is None:
            return asked(name)
        text = json.dumps(steering).replace("{}", name) if steering != "{}" else json.dumps(name)
        return asked("m", json.loads(text))

    assert await refusal(filled("q")) == await refusal(filled("z"))
    assert resolver().served(Access(profiles=frozenset({"p"}))) == ["m", "p"]


async def test_an_alias_of_another_s_profile_does_not_give_its_name_away() -> None:
    limited = RequestContext(access=Access(profiles=frozenset({"p"})))
    found = replace(resolver(), aliases={"fast": "q", "mine": "p"})
    assert found.served(limited.access) == ["m", "p", "mine"]
    with pytest.raises(HttpError, match=r"got 'fast'\); served: m, p, mine$"):
        await found.resolve(asked("fast"), limited)
