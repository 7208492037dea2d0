"""Whatever a body holds: it is read, or refused with a sentence that can be sent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from adapters.formats.artefact import TEMPERATURES, Artefact, Gate, Part, Place
from server.errors import HttpError, response
from server.requests.profiles import Profiles
from server.routes.body import strict_json
from server.validation import DEEPEST, problems
from steering.adapter_ref import AdapterRef
from steering.adapters import ResolvedAdapter, adapt
from steering.errors import BadValue, SteeringError
from steering.method import Limits, Snapshot
from steering.plan import BARE
from steering.plugins import discover
from steering.spec import Profile
from steering.wire import SteeringPayload, pack, unpack
from tests.specs import Streams, specs
from tests.strange import deep, places, spoiled, values
from tests.tiers import examples

LONGEST = 1000
"""Letters of an error: a client's megabyte must not come back."""

# ---- bytes --------------------------------------------------------------------------------

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1")


def read(raw: bytes) -> object:
    """What the bytes hold; raises HttpError only, which can be sent."""
    try:
        return strict_json(raw)
    except HttpError as error:
        check_refusal(error)
        raise


def check_refusal(error: HttpError) -> None:
    assert error.status == 400
    assert len(response(error, "/v1/models").body) > 50


def check_sound(value: object) -> None:
    for at in places(value):
        found: Any = value
        for key in at:
            found = found[key]
        assert not isinstance(found, float) or math.isfinite(found)
        json.dumps(found, ensure_ascii=False).encode()


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode()))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        value = read(raw)
    except HttpError:
        return
    check_sound(value)
    assert json.loads(raw.decode("utf-8-sig")) == value


@settings(max_examples=examples(300))
@given(values(finite=False), st.sampled_from(ENCODINGS), st.booleans())
def test_what_is_read_has_neither_nan_nor_half_a_pair_in_any_encoding(
    value: Any, encoding: str, escaped: bool
) -> None:
    raw = json.dumps(value, ensure_ascii=escaped).encode(encoding, "replace")
    try:
        found = read(raw)
    except HttpError:
        return
    check_sound(found)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt": "\xed\xa0\xbd"}',  # half a pair, in bytes
        '{"temperature": NaN}'.encode("utf-16"),
        b'{"\\ud83d": 1}',
        b'{"a": {"b\\ud83d": 1}}',
        b'{"n": 1e999}',
        b'{"n": -Infinity}',
        b"",
        b"\xff\xfe",
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_what_python_would_take_is_refused(raw: bytes) -> None:
    with pytest.raises(HttpError):
        read(raw)


@pytest.mark.parametrize("levels", [DEEPEST, DEEPEST + 1, 900])
def test_a_body_has_so_many_levels_at_most(levels: int) -> None:
    for raw in (b"[" * levels + b"]" * levels, b'{"x":' * levels + b"0" + b"}" * levels):
        if levels <= DEEPEST:
            read(raw)
            continue
        with pytest.raises(HttpError, match=f"nested too deeply; allowed: {DEEPEST} levels"):
            read(raw)
    # Wide is not deep.
    assert read(b"[" + b"[1, 2]," * 1000 + b"[3]]") is not None


# ---- the field `adapters` -----------------------------------------------------------------

REFS = TypeAdapter(list[AdapterRef])
KEYS = ("name", "weight", "top_k", "temperature", "stream")
PLACES = (Place("f", "a"), Place("f", "b"))
LORA = Artefact(Path("/l"), "lora", ("l",), ({"m": Part(*PLACES, 0, 4, 1.0)},), {}, ("f",))
PACK = Artefact(
    Path("/p"), "meteora", ("x", "y"), ({"m": Part(*PLACES, 0, 2, 1.0)},) * 2,
    {"m": Gate("g", "m")}, ("f",), 1, 1.0,
)  # fmt: skip
OWNERS = {"base": "base", "chat": "chat", "twin": "base"}
SOUND = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["l", "p"])},
        optional={
            "weight": st.floats(-10, 10),
            "top_k": st.none() | st.integers(1, 2),
            "temperature": st.none() | st.floats(*TEMPERATURES),
        },
    ),
    max_size=3,
)


def wished(asked: Any) -> bool:
    """As the server does it, with a LoRA `l` and a pack `p`; whether it is taken."""
    try:
        refs = REFS.validate_python(asked)
        chosen = [
            ResolvedAdapter(PACK if ref.name == "p" else LORA, ref.name, "base", ref.weight,
                            ref.top_k, ref.temperature, f"adapters.{i}")
            for i, ref in enumerate(refs)
        ]  # fmt: skip
        plan, _ = adapt(BARE, chosen, OWNERS, max_rank=16)
    except (ValidationError, SteeringError) as error:
        found = [error] if isinstance(error, SteeringError) else problems(
            [dict(e) for e in error.errors()], "adapters"
        )  # fmt: skip
        assert found and all(e.field.startswith("adapters") for e in found), found
        assert all(len(str(e).encode()) < LONGEST for e in found), found
        return False
    assert all(math.isfinite(use.weight) and use.weight for use in plan.adapters)
    # In float32, which the worker counts in, a temperature must be neither 0 nor infinite.
    assert all(TEMPERATURES[0] <= use.temperature <= TEMPERATURES[1] for use in plan.adapters)
    assert unpack(pack(SteeringPayload(plan))) == SteeringPayload(plan)
    return True


@given(values(KEYS, finite=False))
def test_any_adapters_field_is_taken_or_refused_with_its_field(asked: Any) -> None:
    wished(asked)


@settings(max_examples=examples(300))
@given(spoiled(SOUND, values(finite=False), KEYS))
def test_one_strange_value_among_sound_adapters(asked: Any) -> None:
    wished(asked)


@given(SOUND.filter(lambda found: len({one["name"] for one in found}) == len(found)))
def test_sound_adapters_are_taken(asked: Any) -> None:
    routed = {"top_k", "temperature"}
    plain = [one for one in asked if one["name"] == "p" or not routed & one.keys()]
    assert wished(plain)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e39, 1e308, 0, -1])
def test_a_temperature_that_float32_does_not_have_is_refused(temperature: float) -> None:
    with pytest.raises(ValidationError):
        REFS.validate_python([{"name": "p", "temperature": temperature}])
    with pytest.raises(BadValue, match=r"temperature.*allowed: \[1e-06, 1e\+06\]"):
        adapt(BARE, [ResolvedAdapter(PACK, "p", temperature=temperature)], OWNERS)


# ---- profiles over the admin API -----------------------------------------------------------

METHODS = discover()
SNAPSHOT = Snapshot({"base": "lm", "chat": "lm", "plain": "lm"})
PROFILES = specs(Streams(("chat", "plain"))).map(lambda spec: {**spec, "description": "d"})
FIELDS = ("method", "limits", "chat_template", "description", "strength", "report", "prompts")


def put(name: str, document: Any) -> Profiles | None:
    """The profiles after a PUT; None if it was refused, with a sentence that can be sent."""
    configured = {"own": Profile.model_validate({"method": "mix", "weights": {"base": 1}})}
    profiles = Profiles(configured, base_name="big", methods=METHODS, snapshot=SNAPSHOT,
                        limits=Limits())  # fmt: skip
    try:
        assert profiles.put(name, document)
    except (HttpError, SteeringError) as error:
        check_profile_error(error)
    else:
        return profiles
    assert list(profiles) == ["own"]
    return None


def check_profile_error(error: HttpError | SteeringError) -> None:
    field = error.param if isinstance(error, HttpError) else error.field
    assert field == "name" or str(field).startswith("profiles."), error
    assert len(str(error).encode()) < LONGEST


@given(
    st.sampled_from(["new", "own", "big", "", "a/b", "x" * 65, "é", "a\n"]) | st.text(max_size=5),
    values(FIELDS),
)
def test_any_profile_is_kept_or_refused_with_its_field(name: str, document: Any) -> None:
    put(name, document)


@settings(max_examples=examples(300))
@given(spoiled(PROFILES, values(FIELDS), FIELDS))
def test_one_strange_value_in_a_sound_profile(document: Any) -> None:
    put("new", document)


@given(PROFILES)
def test_a_sound_profile_is_kept_as_it_was_written(document: Any) -> None:
    found = put("new", document)
    assert found is not None
    kept = found["new"].model_dump(exclude_unset=True)
    assert kept == document
    again = put("new", json.loads(json.dumps(kept)))
    assert again is not None and again["new"] == found["new"]


def test_deep_profiles_are_refused() -> None:
    assert put("new", {"method": "mix", "weights": deep(5000)}) is None
