"""Keys: hashed or plain, and what a limited one may use."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.datastructures import Headers

from server.errors import HttpError
from server.operation.auth import EVERYTHING, Access, Auth, access
from server.requests.own_prompts import OwnPrompts
from server.requests.profiles import Profiles
from server.requests.steerer import Steerer
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


@dataclass
class Asked:
    model: str | None = None
    steering: Any = None
    adapters: Any = None
    vllm_xargs: Any = None


def steerer() -> Steerer:
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
    return Steerer("m", methods, profiles, snapshot, limits, True, cast(OwnPrompts, None))


OWN = {"method": "mix", "weights": {"base": 1, "s": 0.1}}


@pytest.mark.parametrize(
    ("asked", "passes"),
    [
        (Asked("m"), True),
        (Asked("p"), True),
        (Asked("m", "p"), True),
        (Asked("m", {"profile": "p", "report": True}), True),
        (Asked("q"), False),
        (Asked("m", "q"), False),
        (Asked("m", {"report": True}), True),
        (Asked("m", {"profile": "q"}), False),
        (Asked("m", OWN), False),
    ],
)
def test_a_limited_key_gets_its_profiles_and_the_plain_base(asked: Asked, passes: bool) -> None:
    found = steerer()
    found.resolve(asked, ExitStack())
    token = access.set(Access(profiles=frozenset({"p"})))
    try:
        if passes:
            found.resolve(asked, ExitStack())
        else:
            with pytest.raises(HttpError) as caught:
                found.resolve(asked, ExitStack())
            assert caught.value.status == 403
    finally:
        access.reset(token)
