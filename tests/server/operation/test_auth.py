"""Keys: hashed or plain, and what a limited one may use."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.datastructures import Headers

from server.access import EVERYTHING, Access
from server.context import RequestContext
from server.errors import HttpError
from server.operation.auth import Auth
from server.requests.own_prompts import OwnPrompts
from server.requests.profiles import Profiles
from server.requests.resolve import Resolver
from server.requests.resolved import ParsedRequest
from server.settings.config import Config, ConfigInvalid
from server.settings.file import parse
from steering.method import Limits, Snapshot
from steering.plugins import discover


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def config(**auth: Any) -> Config:
    return parse({"model": "m", "auth": auth, "server": {"host": "0.0.0.0"}}, Path("/nowhere"), {})


def check(found: Auth, path: str, key: str) -> Access:
    return found.check(path, Headers({"authorization": f"Bearer {key}"}))


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
    narrow.check_steering("p")
    narrow.check_adapter("a")
    closed = check(found, "/v1/models", "closed")
    closed.check_steering(None)
    for refused, words in (
        (lambda: narrow.check_steering("q"), "the profile 'q'"),
        (lambda: narrow.check_steering(None), "its profiles only"),
        (lambda: narrow.check_adapter("b"), "the adapter 'b'"),
        (lambda: closed.check_adapter("a"), "the adapter 'a'"),
    ):
        with pytest.raises(HttpError, match=words) as caught:
            refused()
        assert caught.value.status == 403


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


@pytest.mark.parametrize(
    ("request_", "passes"),
    [
        (asked("m"), True),
        (asked("p"), True),
        (asked("m", "p"), True),
        (asked("m", {"profile": "p", "report": True}), True),
        (asked("q"), False),
        (asked("m", "q"), False),
        (asked("m", {"report": True}), True),
        (asked("m", {"profile": "q"}), False),
        (asked("m", OWN), False),
    ],
)
async def test_a_limited_key_gets_its_profiles_and_the_plain_base(
    request_: ParsedRequest, passes: bool
) -> None:
    await resolver().resolve(request_, RequestContext())
    limited = RequestContext(access=Access(profiles=frozenset({"p"})))
    if passes:
        await resolver().resolve(request_, limited)
        return
    with pytest.raises(HttpError) as caught:
        await resolver().resolve(request_, limited)
    assert caught.value.status == 403
