"""Whatever a configuration file holds: settings, or lines that say what is wrong with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.settings.auth import digest
from server.settings.config import AdaptersConfig, Config, ConfigInvalid, SteeringConfig
from server.settings.file import load, parse
from server.settings.operating import LimitsConfig, ServerConfig
from tests.specs import Streams, specs
from tests.strange import NOT_FINITE, NUMBERS, SURROGATE, deep, replaced, spoiled, values
from tests.tiers import examples

FOLDER = Path("/nowhere/at/all")
SECTIONS = tuple(Config.model_fields)
KEYS = (*SECTIONS, *ServerConfig.model_fields, *LimitsConfig.model_fields,
        *SteeringConfig.model_fields, *AdaptersConfig.model_fields, "on", "same_as")  # fmt: skip
LONGEST = 1000
"""Letters of a line."""

TMP = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(200)
)

SOUND = st.fixed_dictionaries(
    {"model": st.sampled_from(["a/b", "./m", "/m", "~/m"])},
    optional={
        "served_model_name": st.just("big"),
        "streams": st.just({"chat": {"model": "c"}, "plain": {"model": "./p"},
                            "twin": {"same_as": "base"},
                            "probe": {"on": "base", "head": "classifier", "path": "./h"}}),
        "profiles": st.dictionaries(
            st.sampled_from(["one", "two"]), specs(Streams(("chat", "plain"))), max_size=2
        ),
        "steering": st.fixed_dictionaries({}, optional={
            "inline": st.booleans(),
            "strength": st.just([0, 2.5]),
            "weight": st.tuples(st.floats(-9, 0), st.floats(0, 9)).map(list),
            "max_top_k": st.integers(1, 1024),
        }),
        "auth": st.just({"api_keys": ["k", {"key": "sha256:" + "0" * 64, "profiles": ["one"]}],
                         "admin_key": "a"}),
        "server": st.fixed_dictionaries({}, optional={
            "port": st.integers(1, 65535), "max_body_bytes": st.integers(1024, 1 << 30),
        }),
        "limits": st.fixed_dictionaries({}, optional={
            "max_replies": st.integers(1, 1024), "request_timeout_s": st.floats(1, 86400),
        }),
        "adapters": st.just({"roots": ["./loras"], "remotes": ["hf://me"],
                             "preload": [{"name": "a", "source": "./loras/a"}]}),
        "chat": st.just({"template": "{{ messages }}"}),
        "engine": st.just({"dtype": "float32", "max_model_len": 256}),
    },
)  # fmt: skip
"""Documents that the settings take, whether or not their files are there."""


def outcome(document: Any) -> Config | None:
    """The settings; None if they were refused, in lines that say where."""
    try:
        return parse(document, FOLDER, {})
    except ConfigInvalid as error:
        check_lines(error)
        return None


def check_lines(error: ConfigInvalid) -> None:
    assert error.problems
    for line in error.problems:
        assert line.strip() and len(line) < LONGEST, line
        line.encode()


@given(values(KEYS, finite=False))
def test_any_document_is_settings_or_lines(document: Any) -> None:
    outcome(document)


@settings(max_examples=examples(400))
@given(spoiled(SOUND, values(KEYS, finite=False), KEYS))
def test_one_strange_value_in_a_sound_document(document: Any) -> None:
    outcome(document)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(SOUND)
def test_sound_settings_survive_being_written_and_read(document: Any) -> None:
    config = parse(document, FOLDER, {})
    assert parse(config.model_dump(exclude_unset=True), FOLDER, {}) == config
    assert parse(config.model_dump(), FOLDER, {}) == config


@pytest.mark.parametrize(
    ("at", "allowed"),
    [
        (("limits", "max_replies"), "at least 1"),
        (("steering", "max_top_k"), "at least 1|at most 1024"),
        (("adapters", "max_rank"), "at least 1|at most 512"),
        (("limits", "request_timeout_s"), "more than 0|at most 86400"),
        (("metrics", "report_share"), "at least 0|at most 1"),
    ],
)
def test_a_number_out_of_range_is_told_with_field_value_and_range(
    at: tuple[str, str], allowed: str
) -> None:
    low = {"limits.request_timeout_s": 5e-324, "metrics.report_share": 0}.get(".".join(at), 1)
    high = {"max_replies": math.inf, "max_top_k": 1024, "max_rank": 512, "report_share": 1}.get(
        at[1], 86400
    )
    for number in (*NUMBERS, *NOT_FINITE, "1"):
        found = outcome({"model": "m", at[0]: {at[1]: number}})
        if found is not None:
            assert number == "1" or low <= number <= high, number
            continue
        with pytest.raises(ConfigInvalid) as raised:
            parse({"model": "m", at[0]: {at[1]: number}}, FOLDER, {})
        (line,) = raised.value.problems
        assert line.startswith(".".join(at) + ": ")
        assert "(got " in line
        if type(number) is int and abs(number) < 2**62:
            assert any(f"; allowed: {text}" in line for text in allowed.split("|")), line


# ---- files ---------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)
"""Forty lines that stand for 4 to the 40th values."""

SNIPPETS = (
    "model: m\nmodel: n", "? [a]\n: b", "? {a: b}\n: c", "&a [*a]", "model: &a {x: *a}",
    "model: !!int x", "model: !!int ''", "model: !!bool x", "model: !!float x",
    "model: !!timestamp x", "model: 2026-13-01", "model: 0001-01-01T00:00:00+23:59",
    "model: !!binary x", "model: !!set {[a]}", "model: !!omap [1]",
    "model: !!python/name:os.system",
    "<<: {a: 1}", "model: " + "9" * 5000, "model: 0x" + "f" * 9000, "model: " + "1:" * 3000 + "1",
    "[" * 3000, "{a: " * 3000, "- " * 3000, "model: *a", "%YAML 9.9\n---\nmodel: m",
    "model: m\n---\nmodel: n", "model: \"\\ud83d\"", "\x00", "model: m\n\tx: y", "=: m", "model: =",
    "model: \"a\\0b\"", "model: ~nobody-here/x", "model: " + "x" * 5000, "model: /" + "x" * 300,
    "chat: {template: \"a\\0b\"}\nmodel: m", "chat: {template: ~nobody-here/x}\nmodel: m",
    f"chat: {{template: {'x' * 5000}}}\nmodel: m", "adapters: {roots: [\"\\0\"]}\nmodel: m",
    "streams: {1: {model: m}}\nmodel: m", "1: 2", "null: 3", BOMB, BOMB + "model: *a39",
    BOMB + "model: m\nengine: *a39", BOMB + "model: m\nprofiles: {p: {method: mix, x: *a39}}",
)  # fmt: skip
"""What PyYAML, or a path, does not bear."""


def read(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        load(path, {})
    except ConfigInvalid as error:
        check_lines(error)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_odd_files_are_refused_in_lines_and_soon(tmp_path: Path, number: int) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(SNIPPETS[number].encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigInvalid) as raised:
        load(path, {})
    check_lines(raised.value)


@TMP
@given(raw=st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_bytes_are_settings_or_lines(tmp_path: Path, raw: bytes) -> None:
    read(tmp_path / "c.yaml", raw)


@TMP
@given(spoiled(SOUND, values(KEYS, finite=False), KEYS), st.booleans())
def test_any_yaml_is_settings_or_lines(tmp_path: Path, document: Any, flow: bool) -> None:
    text = yaml.safe_dump(document, default_flow_style=flow, allow_unicode=True)
    read(tmp_path / "c.yaml", text.encode("utf-8", "surrogatepass"))


@settings(TMP, max_examples=examples(50))
@given(st.lists(st.sampled_from(SNIPPETS[:34]), max_size=4), st.sampled_from(["\n", "\n  ", " "]))
def test_odd_lines_together(tmp_path: Path, lines: list[str], between: str) -> None:
    read(tmp_path / "c.yaml", between.join(lines).encode("utf-8", "surrogatepass"))


def test_a_link_to_itself_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to(tmp_path / "m")
    (tmp_path / "c.yaml").write_text("model: ./m\nchat: {template: ./m}\n")
    with pytest.raises(ConfigInvalid, match=r"model|template"):
        load(tmp_path / "c.yaml", {})


@pytest.mark.parametrize("levels", [70, 5000])
def test_a_document_has_so_many_levels_at_most(levels: int) -> None:
    for document in ({"model": "m", "engine": {"x": deep(levels)}}, {"model": deep(levels)}):
        with pytest.raises(ConfigInvalid, match="nested too deeply; allowed: 64 levels"):
            parse(document, FOLDER, {})


# ---- keys ----------------------------------------------------------------------------------


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_environment_gives_keys_or_lines(keys: str, admin: str) -> None:
    environ = {"COXSWAIN_API_KEYS": keys, "COXSWAIN_ADMIN_KEY": admin}
    try:
        config = parse({"model": "m"}, FOLDER, environ)
    except ConfigInvalid as error:
        check_lines(error)
        return
    given_keys = [key.strip() for key in keys.split(",") if key.strip()]
    hashes = [entry.key.get_secret_value() for entry in config.auth.api_keys]
    plain = [(one, key) for one, key in zip(hashes, given_keys, strict=True)
             if not key.startswith("sha256:")]  # fmt: skip
    assert all(one == digest(key.encode()) for one, key in plain)
    if admin.strip():
        assert config.auth.admin_key is not None
        assert config.auth.admin_key.get_secret_value() == digest(admin.strip().encode())


@pytest.mark.parametrize(
    ("auth", "environ"),
    [
        ({"admin_key": 31415926}, {}),
        ({"admin_key": "sha256:31415926"}, {}),
        ({"api_keys": [31415926]}, {}),
        ({"api_keys": [{"key": 31415926}]}, {}),
        ({"api_keys": {"31415926": 31415926}}, {}),
        ({}, {"COXSWAIN_ADMIN_KEY": "sha256:31415926"}),
        ({}, {"COXSWAIN_API_KEYS": "ok,sha256:31415926"}),
        ({}, {"COXSWAIN_ADMIN_KEY": "31415926" + SURROGATE}),
    ],
)
def test_a_key_that_cannot_be_one_is_not_repeated(
    auth: dict[str, Any], environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigInvalid) as raised:
        parse({"model": "m", "auth": auth}, FOLDER, environ)
    check_lines(raised.value)
    assert "auth." in str(raised.value)
    assert "31415926" not in str(raised.value)


def test_a_bomb_costs_nothing_where_it_is_shown() -> None:
    bomb: Any = "x"
    for _ in range(40):
        bomb = [bomb] * 4
    for at in (("model",), ("served_model_name",), ("plugins",), ("steering", "strength")):
        document = replaced({"model": "m", "steering": {}}, at, bomb)
        with pytest.raises(ConfigInvalid):
            parse(document, FOLDER, {})
    assert json.dumps(str(ConfigInvalid(["x"])))
