"""The configuration: what is accepted, and how problems are told."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from server.settings import auth, config, operating
from server.settings.auth import digest, digests_of_header
from server.settings.config import Config, ConfigInvalid
from server.settings.file import load, parse
from server.settings.operating import Section
from server.settings.reference import reference

ROOT = Path(__file__).resolve().parents[3]


def refused(document: object, folder: Path = Path("/nowhere")) -> str:
    with pytest.raises(ConfigInvalid) as caught:
        parse(document, folder, {})
    return str(caught.value)


def test_the_documented_example_is_accepted() -> None:
    parsed = parse(
        {
            "model": "org/big",
            "served_model_name": "big",
            "streams": {
                "chat": {"model": "org/chat"},
                "value": {"model": "org/value", "head": "value"},
                "probe": {"on": "base", "head": "classifier", "path": "org/probe"},
                "twin": {"same_as": "base"},
            },
            "profiles": {"big-chat": {"method": "mix", "weights": {"base": 1, "chat": 0.5}}},
            "adapters": {"roots": ["/adapters"], "preload": [{"name": "a", "source": "b"}]},
            "registry": {"url": "redis://localhost"},
            "steering": {"inline": False, "strength": [0, 3], "weight": [-1, 1]},
            "auth": {"api_keys": ["k"], "admin_key": "a"},
            "engine": {"max_model_len": 128},
        },
        Path("/nowhere"),
        {},
    )
    assert parsed.name == "big"
    assert parsed.profiles["big-chat"].spec == {
        "method": "mix",
        "weights": {"base": 1, "chat": 0.5},
    }
    assert parsed.steering.limits.strength == (0, 3)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "model: is required"),
        ([], "must be a mapping"),
        ({"model": "a", "modle": 1}, "modle: unknown field"),
        ({"model": "a", "server": {"port": 70000}}, "server.port: is too large (got 70000)"),
        ({"model": "a", "server": {"prot": 1}}, "server.prot: unknown field"),
        ({"model": "a", "streams": {"base": {"model": "b"}}}, "streams.base: the name is taken"),
        ({"model": "a", "streams": {"c": {}}}, "exactly one of model, same_as, on"),
        ({"model": "a", "streams": {"c": {"same_as": "d"}}}, "streams.c.same_as: no such stream"),
        ({"model": "a", "streams": {"x/y": {"model": "b"}}}, "not a usable name"),
        ({"model": "a", "steering": {"strength": [-1, 3]}}, "start at 0"),
        ({"model": "a", "steering": {"weight": [3, 1]}}, "steering.weight: a range is"),
        ({"model": "a", "steering": {"weight": [0, float("nan")]}}, "must be a finite number"),
        ({"model": "x/p", "profiles": {"p": {"method": "mix"}}}, "must not have the base's name"),
        ({"model": "a", "engine": {"model": "b"}}, "engine.model: not here"),
        ({"model": "a", "profiles": {"p": {"strength": 1}}}, "profiles.p.method: is required"),
        ({"model": "a", "limits": {"max_prompt_tokens": 0}}, "limits.max_prompt_tokens: is too"),
        ({"model": "a", "limits": {"requests_per_minute": 0}}, "requests_per_minute: is too"),
        ({"model": "a", "limits": {"request_timeout_s": 0}}, "limits.request_timeout_s: is too"),
        ({"model": "a", "registry": {"url": "redis+sentinel://h"}}, "registry.url: behind the"),
        ({"model": "a", "registry": {"url": "redis://a", "ca_file": "x"}}, "registry: ca_file:"),
        ({"model": "a", "registry": {"url": "rediss://a", "ca_file": "x"}}, "ca_file: no such"),
        ({"model": "a", "limits": {"redis_ca_file": "x"}}, "limits: redis_ca_file: certificates"),
        ({"model": "a", "registry": {"url": "redis://a,b"}}, "registry.url: several hosts need"),
        ({"model": "a", "limits": {"redis": "localhost"}}, "limits.redis: not an address"),
        ({"model": "a", "limits": {"tokens": 3}}, "limits.tokens: unknown field"),
        ({"model": "a", "metrics": {"report_share": 2}}, "metrics.report_share: is too large"),
        ({"model": "a", "logging": {"format": "xml"}}, "logging.format: "),
        ({"model": "a", "logging": {"prompts": True}}, "goes with `requests: true`"),
        ({"model": "a", "tracing": {}}, "tracing.endpoint: is required"),
        ({"model": "a", "tracing": {"endpoint": "host:4317"}}, "tracing.endpoint: "),
        ({"model": "a", "server": {"drain_notice_s": -1}}, "server.drain_notice_s: is too small"),
        ({"model": "a", "auth": {"api_keys": [{"key": "k", "tokens_per_minute": 0}]}},
         "tokens_per_minute"),
        ({"model": "a", "chat": {"default_template_kwargs": {"tools": []}}},
         "default_template_kwargs: tools is no variable"),
        ({"model": "a", "aliases": {"a": "b"}}, "aliases.a: the name is taken"),
        ({"model": "a", "aliases": {"x": "y", "y": "a"}}, "aliases.x: an alias of an alias"),
        ({"model": "a", "aliases": {"x/y/z": "a"}}, "aliases.x/y/z: not a usable name"),
        ({"model": "a", "server": {"cors": {"origins": []}}}, "server.cors.origins: has too few"),
        ({"model": "a", "server": {"cors": {"origins": ["x.org"]}}}, "'x.org' is no origin"),
        ({"model": "a", "server": {"cors": {"origins": ["*"], "credentials": True}}},
         "server.cors: credentials: name the origins"),
        ({"model": "a", "server": {"tls": {"certificate": "c"}}}, "server.tls.key: is required"),
        ({"model": "a", "server": {"tls": {"certificate": "c", "key": "k", "clients": "required"}}},
         "server.tls: clients: required needs `client_ca`"),
        ({"model": "a", "server": {"root_path": "llm/"}}, "server.root_path: has another form"),
        ({"model": "a", "server": {"unknown_fields": "x"}}, "server.unknown_fields: is not one"),
        ({"model": "a", "auth": {"api_keys": [{"key": "k", "group": ""}]}}, "group: has another"),
        ({"model": "a", "profiles": {"p": {"method": "m", "chat_template": "gone.jinja"}}},
         "profiles.p.chat_template: neither a template text nor a file"),
    ],
)  # fmt: skip
def test_a_problem_names_its_field(document: object, words: str) -> None:
    assert words in refused(document)


def test_all_problems_are_told_at_once() -> None:
    text = refused({"model": "a", "nonsense": 1, "server": {"port": -1}})
    assert "nonsense" in text
    assert "server.port" in text


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "models" / "big").mkdir(parents=True)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: models/big\nstreams: {a: {model: ./gone}, b: {model: org/name}}\n"
        "profiles: {p: {method: mix, chat_template: chat.jinja}}\n"
    )
    found = load(file, {})
    assert found.model == str(tmp_path / "models" / "big")
    assert found.name == "big"
    assert found.streams["a"].model == str(tmp_path / "gone")
    assert found.streams["b"].model == "org/name"
    assert found.profiles["p"].chat_template == "{{ messages }}"


@pytest.mark.parametrize("section", ["registry", "limits"])
def test_passwords_of_redis_do_not_show(section: str) -> None:
    field = {"registry": "url", "limits": "redis"}[section]
    document = {"model": "m", section: {field: "redis://:hidden@host:6379"}}
    assert "hidden" not in repr(parse(document, Path("/nowhere"), {}))


def test_keys_come_from_the_environment_and_do_not_show() -> None:
    environ = {"COXSWAIN_API_KEYS": "key-1, key-2", "COXSWAIN_ADMIN_KEY": "key-3"}
    found = parse({"model": "a", "auth": {"api_keys": ["file"]}}, Path("/"), environ)
    hashes = [entry.key.get_secret_value() for entry in found.auth.api_keys]
    assert hashes == [digest(b"key-1"), digest(b"key-2")]
    assert found.auth.admin_key is not None
    assert found.auth.admin_key.get_secret_value() == digest(b"key-3")
    assert b"key-" not in pickle.dumps(found) and "key-" not in repr(found)


@pytest.mark.parametrize(
    "document",
    [
        {"auth": "pw-1"},
        {"auth": ["pw-1"]},
        {"auth": {"api_keys": {"pw-1": "pw-1"}}},
        {"auth": {"admin_key": ["pw-1"]}},
        {"registry": {"url": "redis//:pw-1@h"}, "adapters": {}},
        {"registry": "redis://:pw-1@h"},
        {"registry": {"url": ["redis://:pw-1@h"]}},
        {"limits": {"redis": "redis://:pw-1@h:port"}},
        {"limits": ["redis://:pw-1@h"]},
    ],
)
def test_what_may_be_a_secret_is_not_repeated(document: dict[str, Any]) -> None:
    told = refused({"model": "m", **document})
    assert "pw-1" not in told and told.startswith(next(iter(document)))


def test_passwords_of_urls_are_not_shown() -> None:
    urls = {"registry": {"url": "redis://:pw-1@h"}, "limits": {"redis": "redis://:pw-2@h"}}
    assert "pw-" not in repr(parse({"model": "m", "adapters": {}, **urls}, Path("/"), {}))


@pytest.mark.parametrize("key", [" k", "k ", "a\nb", "a\tb", "\x7f"])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    assert "auth.admin_key: a key must have no" in refused(
        {"model": "a", "auth": {"admin_key": key}}
    )


def test_a_key_outside_ascii_is_known_however_it_is_sent() -> None:
    found = parse({"model": "a", "auth": {"admin_key": "clé-ß"}}, Path("/"), {})
    assert found.auth.admin_key is not None
    known = found.auth.admin_key.get_secret_value()
    for sent in ("utf-8", "latin-1"):
        assert known in digests_of_header("clé-ß".encode(sent).decode("latin-1"))
    assert known not in digests_of_header("cle-ss")


@pytest.mark.parametrize("text", ["model: a\nmodel: b\n", "model: [", "just text", ""])
def test_broken_yaml_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigInvalid):
        load(file, {})


def test_a_key_given_twice_is_refused_without_its_value(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: a\nauth:\n  admin_key: secret-1\n  admin_key: secret-2\n")
    with pytest.raises(ConfigInvalid) as raised:
        load(file, {})
    assert 'line 4: found duplicate key "admin_key"' in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.timeout(20)
def test_merges_of_merges_are_refused_at_once(tmp_path: Path) -> None:
    """Thirteen such lines kept a loader busy for minutes."""
    file = tmp_path / "c.yaml"
    lines = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 4)}]}}\n" for i in range(1, 25)]
    file.write_text("model: m\na0: &a0 {x: 1, y: 2}\n" + "".join(lines))
    with pytest.raises(ConfigInvalid, match=r"line 3: `<<` is YAML 1\.1"):
        load(file, {})


def test_a_missing_file_is_a_problem_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="No such file"):
        load(tmp_path / "gone.yaml", {})


def test_settings_are_frozen() -> None:
    found = parse({"model": "a"}, Path("/"), {})
    with pytest.raises(ValueError, match="frozen"):
        found.server.__setattr__("port", 1)


def _all_fields() -> list[tuple[str, str, Any]]:
    sections = [
        c
        for module in (config, auth, operating)
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Section) and c.__module__ == module.__name__
        if c is not Config
    ]
    return [
        (section.__name__, name, info)
        for section in sections
        for name, info in section.model_fields.items()
    ]  # fmt: skip


@pytest.mark.parametrize(("section", "name", "info"), _all_fields())
def test_every_setting_has_a_description(section: str, name: str, info: Any) -> None:
    assert info.description, f"{section}.{name} has no description"


def test_the_page_in_docs_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run: coxswain reference > docs/reference/configuration.md"
    )


def test_words_of_yaml_1_1_for_true_and_false_are_words(tmp_path: Path) -> None:
    """`on` is a key of streams; unquoted it would else be the key True."""
    path = tmp_path / "server.yaml"
    path.write_text(
        "model: m\n"
        "streams:\n"
        "  critic: {on: base, head: classifier, path: here}\n"
        "  no: {same_as: base}\n"
        "steering: {inline: false}\n"
    )
    found = load(path, {})
    assert found.streams["critic"].on == "base" and "no" in found.streams
    assert found.steering.inline is False
