"""A request's steering: an object, a profile, or a profile with some fields overridden.

A *spec* is the plain mapping that a request writes in its `steering` field, once profiles are
folded in; `steering.resolve` turns it into a plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from steering.adapter_ref import AdapterRef
from steering.errors import BadValue, NotFound
from steering.method import Limits, refusal
from steering.where import read_where

FIELD = "steering"
"""The request field, and the first part of every field path in an error."""

MOST_STOPS = 16
"""Texts at which a reply may end."""

MOST_ADAPTERS = 64
"""Of a request, or of a profile."""

OVERRIDABLE_ALWAYS = frozenset({"report"})
"""Fields that a caller may set on a profile even where callers may not steer freely."""


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not (all(map(math.isfinite, value)) and value[0] <= value[1]):
        raise refusal("a range is [low, high] with finite low ≤ high")
    return value


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


class ProfileLimits(BaseModel):
    """The ranges of one profile, inside the server's; null keeps the server's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strength: Range | None = Field(None, description="Range of every strength, [low, high].")
    weight: Range | None = Field(None, description="Range of every weight, [low, high].")


Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]


class Sampling(BaseModel):
    """How requests with a profile are drawn, each field where a request does not set it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float | None = Field(None, ge=0, description="0: the most likely token.")
    top_p: float | None = Field(None, gt=0, le=1, description="Probability of the tokens to keep.")
    top_k: int | None = Field(None, ge=0, description="Tokens to keep; 0: all.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Least probability, as a share of the most likely token's."
    )
    top_n_sigma: float | None = Field(
        None, gt=0, le=100, description="Standard deviations below the largest score to keep."
    )
    repetition_penalty: float | None = Field(
        None, gt=0, description="Above 1: tokens of prompt and reply become less likely."
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted from the score of each token of the reply."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="The same, for each occurrence of the token."
    )
    max_tokens: int | None = Field(None, ge=1, description="Longest reply, in tokens.")
    stop: Stops | None = Field(None, description="Texts at which a reply ends.")


class Profile(BaseModel):
    """A named steering object, set up by the operator. Frozen; extra fields are the method's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = Field(description="The method's name; its fields stand beside this one.")
    limits: ProfileLimits = Field(
        default_factory=ProfileLimits,
        description="What a caller may ask for with this profile; inside the server's limits.",
    )
    chat_template: str | None = Field(
        None, description="The base's chat template for this profile: its text, or a file's path."
    )
    system: str | None = Field(
        None,
        min_length=1,
        description="A system prompt for conversations that bring none. Text completions are no "
        "conversations.",
    )
    sampling: Sampling = Field(
        default_factory=Sampling, description="Defaults of sampling parameters."
    )
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="Tokens of the base that end a reply, beside its own end. Absent: the ends of "
        "the streams with positive weight, where they are tokens of the base.",
    )
    adapters: tuple[AdapterRef, ...] = Field(
        (),
        max_length=MOST_ADAPTERS,
        description="Adapters and vectors of its requests, as in a request's `adapters`. One that "
        "a request names itself is used as the request says.",
    )
    description: str | None = Field(None, description="One sentence for people.")

    @property
    def spec(self) -> dict[str, Any]:
        """The steering object, without what only the server reads."""
        return {"method": self.method, **(self.model_extra or {})}

    def narrow(self, server: Limits, field: str) -> Limits:
        """The limits of this profile.

        Args:
            server: what the server allows.
            field: where the profile stands, e.g. `profiles.chat`.

        Raises:
            BadValue: the profile's range reaches outside the server's.
        """
        ranges = {}
        for name in ("strength", "weight"):
            asked, (low, high) = getattr(self.limits, name), getattr(server, name)
            if asked is not None:
                if not low <= asked[0] <= asked[1] <= high:
                    raise BadValue(
                        "a profile may narrow the server's range, not widen it",
                        field=f"{field}.limits.{name}",
                        value=list(asked),
                        allowed=f"inside [{low:g}, {high:g}]",
                    )
                ranges[name] = asked
        return replace(server, **ranges)

    def check_adapters(self, limits: Limits, field: str) -> None:
        """Checks its adapters, as far as that can be done before they are loaded.

        Args:
            limits: the profile's.
            field: where the profile stands.

        Raises:
            BadValue: a weight out of range, a wrong `where`, or the same name twice.
        """
        seen: set[str] = set()
        for i, ref in enumerate(self.adapters):
            low, high = limits.weight
            if not low <= ref.weight <= high:
                raise BadValue("out of range", field=f"{field}.adapters.{i}.weight",
                               value=ref.weight, allowed=f"[{low:g}, {high:g}]")  # fmt: skip
            if ref.where is not None:
                read_where(ref.where, f"{field}.adapters.{i}.where", BadValue)
            if ref.adapter in seen:
                raise BadValue("names the same adapter twice", value=ref.name,
                               field=f"{field}.adapters.{i}.name")  # fmt: skip
            seen.add(ref.adapter)


@dataclass(frozen=True, slots=True)
class SteeringRequest:
    """A request's steering with profiles merged; not yet checked by its method.

    Args:
        spec: the steering object.
        limits: the ranges that hold for it.
        profile: the profile it came from, or None.
    """

    spec: Mapping[str, Any]
    limits: Limits
    profile: str | None = None


def read_steering(
    asked: object,
    *,
    profiles: Mapping[str, Profile],
    limits: Limits,
    inline: bool = True,
    model_profile: str | None = None,
) -> SteeringRequest | None:
    """Folds profiles into what the request's `steering` field holds.

    Args:
        asked: the field's value: None, a profile's name, or an object. An object with a
            `profile` key, or sent with a profile as the model, overrides that profile's fields.
        profiles: the server's profiles by name.
        limits: the server's.
        inline: False if callers may use profiles only.
        model_profile: the profile that the request named as its `model`, or None.

    Returns:
        What is asked for; None: no steering.

    Raises:
        NotFound: no such profile.
        BadValue: an object where only profiles are allowed, a field that may not be overridden,
            or two different profiles.
    """
    name, overrides = _parts(asked, model_profile)
    if name is not None:
        return _from_profile(name, overrides, profiles, limits, inline)
    if asked is None:
        return None
    if not inline and overrides.keys() != OVERRIDABLE_ALWAYS:
        raise BadValue(
            "this server takes profiles only, not a steering object",
            field=FIELD,
            value=dict(overrides),
            allowed=_one_of(profiles, "profile"),
        )
    return SteeringRequest(overrides, limits)


def _parts(asked: object, model_profile: str | None) -> tuple[str | None, Mapping[str, Any]]:
    """The profile's name, if any, and the fields written beside it."""
    named: object = None
    overrides: dict[str, Any] = {}
    if isinstance(asked, str):
        named = asked
    elif isinstance(asked, Mapping):
        overrides = {str(key): value for key, value in asked.items()}
        named = overrides.pop("profile", None)
        if named is not None and not isinstance(named, str):
            raise BadValue("a profile's name is text", field=f"{FIELD}.profile", value=named)
    elif asked is not None:
        raise BadValue("give a profile's name or an object", field=FIELD, value=asked)
    if model_profile is not None and named not in (None, model_profile):
        raise BadValue(
            f"the model {model_profile!r} is a profile already",
            field=f"{FIELD}.profile",
            value=named,
            allowed=model_profile,
        )
    return (named if isinstance(named, str) else model_profile), MappingProxyType(overrides)


def _from_profile(
    name: str,
    overrides: Mapping[str, Any],
    profiles: Mapping[str, Profile],
    limits: Limits,
    inline: bool,
) -> SteeringRequest:
    if name not in profiles:
        raise NotFound(
            "no such profile", field=FIELD, value=name, allowed=_one_of(profiles, "profile")
        )
    profile = profiles[name]
    if overrides.get("method", profile.method) != profile.method:
        raise BadValue(
            "a profile's method cannot be overridden",
            field=f"{FIELD}.method",
            value=overrides["method"],
            allowed=profile.method,
        )
    for field in overrides:
        if not inline and field not in OVERRIDABLE_ALWAYS:
            raise BadValue(
                "this server takes profiles as they are",
                field=f"{FIELD}.{field}",
                value=overrides[field],
                allowed=f"only {', '.join(sorted(OVERRIDABLE_ALWAYS))} may be set",
            )
    narrowed = profile.narrow(limits, f"profiles.{name}")
    return SteeringRequest({**profile.spec, **overrides}, narrowed, name)


def _one_of(names: Mapping[str, object], what: str) -> str:
    return f"one of: {', '.join(sorted(names))}" if names else f"(there is no {what})"
