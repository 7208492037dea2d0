"""Profiles: named, narrowed, overridden."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from steering.errors import BadValue, NotFound
from steering.method import Limits
from steering.spec import Profile, SteeringRequest, read_steering

CHAT = Profile.model_validate(
    {
        "method": "proxy_tuning",
        "expert": "chat",
        "anti_expert": "plain",
        "strength": 1.0,
        "limits": {"strength": [0, 2]},
        "chat_template": "chat.jinja",
        "description": "A chat model.",
    }
)
OTHER = Profile.model_validate({"method": "mix", "weights": {"base": 1.0}})
PROFILES = {"chat-70b": CHAT, "other": OTHER}
FIELDS = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.0}
SERVER = Limits(strength=(0.0, 5.0))


def read(asked: object, model: str | None = None, inline: bool = True) -> SteeringRequest | None:
    return read_steering(
        asked, profiles=PROFILES, limits=SERVER, inline=inline, model_profile=model
    )


def test_no_wish_is_no_steering() -> None:
    assert read(None) is None
    assert read(None, inline=False) is None


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ("chat-70b", None),
        ({"profile": "chat-70b"}, None),
        (None, "chat-70b"),
        ({}, "chat-70b"),
        ("chat-70b", "chat-70b"),
        ({"profile": "chat-70b", "method": "proxy_tuning"}, None),
    ],
)
def test_a_profile_can_be_named_in_three_ways(asked: object, model: str | None) -> None:
    request = read(asked, model)
    assert request == SteeringRequest(FIELDS, Limits(strength=(0.0, 2.0)), "chat-70b")


@pytest.mark.parametrize(
    ("asked", "model"),
    [({"strength": 0.5}, "chat-70b"), ({"profile": "chat-70b", "strength": 0.5}, None)],
)
def test_an_override_replaces_the_profiles_field(asked: object, model: str | None) -> None:
    request = read(asked, model)
    assert request is not None
    assert request.spec == {**FIELDS, "strength": 0.5}
    assert CHAT.spec == FIELDS


def test_an_object_of_its_own_has_the_servers_limits() -> None:
    assert read(FIELDS) == SteeringRequest(FIELDS, SERVER)


def test_an_unknown_profile_lists_the_known() -> None:
    with pytest.raises(NotFound, match="one of: chat-70b, other"):
        read("nobody")
    with pytest.raises(NotFound, match="there is no profile"):
        read_steering("nobody", profiles={}, limits=SERVER)


@pytest.mark.parametrize(
    ("asked", "model", "inline", "field"),
    [
        ({"method": "mix"}, "chat-70b", True, "steering.method"),
        ({"profile": "other"}, "chat-70b", True, "steering.profile"),
        ("other", "chat-70b", True, "steering.profile"),
        ({"profile": 3}, None, True, "steering.profile"),
        (["chat-70b"], None, True, "steering"),
        (True, None, True, "steering"),
        (FIELDS, None, False, "steering"),
        ({}, None, False, "steering"),
        ({"strength": 0.5}, "chat-70b", False, "steering.strength"),
        ({"profile": "chat-70b", "expert": "plain"}, None, False, "steering.expert"),
    ],
)
def test_what_may_not_be_asked(asked: object, model: str | None, inline: bool, field: str) -> None:
    with pytest.raises(BadValue) as caught:
        read(asked, model, inline)
    assert caught.value.field == field


def test_report_may_be_asked_for_even_where_profiles_are_fixed() -> None:
    request = read({"report": True}, "chat-70b", inline=False)
    assert request is not None
    assert request.spec == {**FIELDS, "report": True}


def test_a_profile_cannot_widen_the_servers_range() -> None:
    profile = CHAT.model_copy(
        update={"limits": CHAT.limits.model_copy(update={"strength": (0.0, 6.0)})}
    )
    with pytest.raises(BadValue, match=r"inside \[0, 5\]") as caught:
        profile.narrow(SERVER, "profiles.chat")
    assert caught.value.field == "profiles.chat.limits.strength"


@pytest.mark.parametrize(
    "limits",
    [{"strength": [2, 1]}, {"strength": [0, float("inf")]}, {"speed": [0, 1]}, {"weight": [1]}],
)
def test_a_profiles_ranges_are_checked(limits: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Profile.model_validate({**FIELDS, "limits": limits})


def test_a_profile_survives_storage() -> None:
    assert Profile.model_validate_json(CHAT.model_dump_json()) == CHAT
    assert Profile.model_validate(OTHER.model_dump()).spec == OTHER.spec
