"""The command line of `coxswain serve`, beside that of `vllm serve`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest

from server.main import _configuration, parser, run
from server.settings.auth import digest
from server.settings.config import Config, ConfigInvalid
from server.settings.file import parse
from server.settings.flag_page import classes, flag_page
from server.settings.flags import (
    check_tool_choice,
    dashed,
    engine_fields,
    engine_flags,
    from_flags,
    vllm_parser,
)
from server.settings.vllm_flags import FLAGS, NO_EFFECT, NO_LONGER, REFUSED
from steering.engine_args import steered_engine_args
from tests.models import make_model

ROOT = Path(__file__).resolve().parents[3]
ACTIONS = [a for a in vllm_parser()._actions if a.option_strings]


def read(*argv: str) -> tuple[Config, dict[str, Any]]:
    """The configuration and the engine arguments of `coxswain serve ARGV`."""
    given, rest = parser().parse_known_args(dashed(["serve", *argv]))
    config = _configuration(rest, from_flags(given))
    check_tool_choice(given, config.chat.tool_call_parser)
    return config, engine_flags(rest)


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COXSWAIN_API_KEYS", "COXSWAIN_ADMIN_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.dest)
def test_every_flag_of_vllm_is_one_thing(action: argparse.Action) -> None:
    found = classes(action.dest)
    assert len(found) == 1, found
    kind, text = found[0]
    assert text or kind == "engine"


def test_the_tables_name_no_flag_that_vllm_does_not_have() -> None:
    there = {action.dest for action in ACTIONS}
    assert {flag.dest for flag in FLAGS if not flag.ours} <= there
    assert set(NO_EFFECT) | set(REFUSED) <= there
    assert not there & ({flag.dest for flag in FLAGS if flag.ours} | set(NO_LONGER))


def test_every_flag_of_ours_sets_what_there_is() -> None:
    for flag in FLAGS:
        model: Any = Config
        for key in flag.setting.split(".") if flag.setting else ():
            info = model.model_fields[key]
            model = next((t for t in (info.annotation, *getattr(info.annotation, "__args__", ()))
                          if hasattr(t, "model_fields")), None)  # fmt: skip


def test_the_page_in_docs_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "vllm-flags.md"
    assert page.read_text(encoding="utf-8") == flag_page(), (
        "run: coxswain reference --vllm-flags > docs/reference/vllm-flags.md"
    )


def test_what_users_of_vllm_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    (tmp_path / "sql").mkdir()
    config, engine = read(
        "org/model", "--host", "0.0.0.0", "--port", "9000", "--root-path", "/llm",
        "--api-key", "one", "two", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--reasoning-parser", "qwen3", "--chat-template", "chat.jinja",
        "--chat-template-content-format", "openai",
        "--default-chat-template-kwargs", '{"enable_thinking": false}',
        "--lora-modules", "sql=./sql", '{"name": "py", "path": "org/py", "base_model_name": "x"}',
        "--enable-lora", "--max-loras", "3", "--max-lora-rank", "16",
        "--served-model-name", "big", "also", "and/also",
        "--ssl-keyfile", "k.pem", "--ssl-certfile", "c.pem", "--ssl-ca-certs", "ca.pem",
        "--ssl-cert-reqs", "2", "--enable-ssl-refresh",
        "--allowed-origins", '["http://localhost:3000"]', "--allowed-methods", '["POST"]',
        "--allow-credentials", "--disable-log-requests", "--shutdown-timeout", "7",
        "--sse-keep-alive-interval", "5",
        "--max-model-len", "4096", "-tp", "2", "--dtype=bfloat16", "--enforce_eager",
        "--structured-outputs-config.backend", "guidance", "-O0",
    )  # fmt: skip
    assert config.model == "org/model" and config.name == "big"
    assert config.aliases == {"also": "big", "and/also": "big"}
    assert (config.server.host, config.server.port, config.server.root_path) == (
        "0.0.0.0", 9000, "/llm",
    )  # fmt: skip
    assert [entry.key.get_secret_value() for entry in config.auth.api_keys] == [
        digest(b"one"), digest(b"two"),
    ]  # fmt: skip
    assert config.chat.tool_call_parser == "hermes" and config.chat.reasoning_parser == "qwen3"
    assert config.chat.template == "{{ messages }}" and config.chat.content_format == "openai"
    assert config.chat.default_template_kwargs == {"enable_thinking": False}
    section, tls, cors = config.adapters, config.server.tls, config.server.cors
    assert section is not None and tls is not None and cors is not None
    sql = str(tmp_path / "sql")
    assert [(one.name, one.source) for one in section.preload] == [
        ("sql", sql), ("py", "hf://org/py"),
    ]  # fmt: skip
    assert section.roots == (sql,) and section.remotes == ("hf://org/py",)
    assert (section.max_loaded, section.max_rank) == (3, 16)
    assert (tls.certificate, tls.key) == (str(tmp_path / "c.pem"), str(tmp_path / "k.pem"))
    assert (tls.client_ca, tls.clients, tls.refresh) == (
        str(tmp_path / "ca.pem"), "required", True,
    )  # fmt: skip
    assert cors.origins == ("http://localhost:3000",) and cors.methods == ("POST",)
    assert cors.credentials and cors.headers == ("*",)
    assert not config.logging.requests and config.server.drain_timeout_s == 7
    assert config.server.sse_keep_alive_s == 5
    assert engine["max_model_len"] == 4096 and engine["tensor_parallel_size"] == 2
    assert engine["dtype"] == "bfloat16" and engine["enforce_eager"] is True
    assert set(engine) <= engine_fields()
    assert engine["structured_outputs_config"] == {"backend": "guidance"}


def test_a_model_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = read("some/model-id")
    assert (config.model, config.name) == ("some/model-id", "some/model-id")
    assert config.adapters is not None and config.adapters.max_loaded == 8
    (tmp_path / "some" / "model-id").mkdir(parents=True)
    config, _ = read("some/model-id")
    assert (config.model, config.name) == (str(tmp_path / "some" / "model-id"), "model-id")
    assert read("--model", "org/x")[0].model == "org/x"
    section = read("org/x", "--adapter-roots", "loras", "--adapter-remotes", "hf://me")[0].adapters
    assert section is not None
    assert section.roots == (str(tmp_path / "loras"),) and section.remotes == ("hf://me",)
    assert read("org/x", "--no-enable-lora")[0].adapters is None
    with pytest.raises(ConfigInvalid, match=r"gone\.yaml: No such file"):
        read("gone.yaml")
    for argv in ([], ["--port", "1"], ["--max-model-len", "64", "org/x"]):
        with pytest.raises(ConfigInvalid, match="give CONFIG, or a model, first"):
            read(*argv)


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: org/m\nserver: {port: 1, host: here}\nauth: {api_keys: [f]}\n"
        "adapters: {preload: [{name: a, source: s}], roots: [s]}\n"
    )
    monkeypatch.setenv("COXSWAIN_SERVER__PORT", "2")
    monkeypatch.setenv("COXSWAIN_SERVER__MAX_IN_FLIGHT", "5")
    monkeypatch.setenv("VLLM_API_KEY", "v")
    config, _ = read(str(file))
    assert (config.server.port, config.server.host, config.server.max_in_flight) == (2, "here", 5)
    assert [entry.key.get_secret_value() for entry in config.auth.api_keys] == [digest(b"v")]
    monkeypatch.setenv("COXSWAIN_API_KEYS", "c")
    config, _ = read(str(file), "--port", "3", "--lora-modules", "b=https://x.org/b")
    assert (config.server.port, config.server.max_in_flight) == (3, 5)
    assert [entry.key.get_secret_value() for entry in config.auth.api_keys] == [digest(b"c")]
    assert config.adapters is not None
    assert [one.name for one in config.adapters.preload] == ["a", "b"]
    assert config.adapters.roots == (str(tmp_path / "s"),)
    assert config.adapters.remotes == ("https://x.org/b",)
    config, _ = read(str(file), "--api-key", "x")
    assert [entry.key.get_secret_value() for entry in config.auth.api_keys] == [digest(b"x")]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"COXSWAIN_SERVRE__PORT": "1"}, "COXSWAIN_SERVRE__PORT: there is no section 'servre'"),
        ({"COXSWAIN_SERVER__PROT": "1"}, "server.prot: unknown field"),
        ({"COXSWAIN_SERVER__PORT": "x"}, "server.port: must be a whole number"),
        ({"COXSWAIN_ADAPTERS__ROOTS": "a"}, "COXSWAIN_ADAPTERS__…: lists and objects are JSON"),
    ],
)
def test_a_problem_of_the_environment_names_it(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigInvalid) as raised:
        parse({"model": "m"}, Path("/"), environ)
    assert words in str(raised.value)


def test_the_environment_sets_engine_arguments_and_lists() -> None:
    environ = {
        "COXSWAIN_ENGINE__MAX_MODEL_LEN": "4096", "COXSWAIN_ENGINE__DTYPE": "float32",
        "COXSWAIN_SERVER__CORS": '{"origins": ["https://a.org"]}', "COXSWAIN_PORT": "tcp://1.2.3.4",
        "COXSWAIN_STREAMS__CHAT__MODEL": "org/chat",
    }  # fmt: skip
    config = parse({"model": "m", "engine": {"seed": 1}}, Path("/"), environ)
    assert config.engine == {"seed": 1, "max_model_len": 4096, "dtype": "float32"}
    assert config.server.cors is not None and config.server.cors.origins == ("https://a.org",)
    assert config.streams["chat"].model == "org/chat"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "80000"], "server.port: is too large"),
        (["--middleware", "a.b"], "--middleware: code in front of the routes"),
        (["--hf-overrides", "{}"], "--hf-overrides: Coxswain sets it"),
        (["--spec-model", "x"], "--spec-model: use `steering.speculation`"),
        (["--config", "x.yaml"], "--config: give Coxswain's own file"),
        (["--api-server-count", "2"], "--api-server-count: one process is one engine"),
        (["--enable-auto-tool-choice"], "needs chat.tool_call_parser (--tool-call-parser)"),
        (["--no-enable-auto-tool-choice", "--tool-call-parser", "hermes"],
         "leave chat.tool_call_parser out"),
        (["--max-modle-len", "1"], "there is no flag --max-modle-len; is it --max-model-len?"),
        (["--tool-cal-parser", "x"], "is it --tool-call-parser?"),
        (["--swap-space", "4"], "there is no flag --swap-space any more: vLLM has no such"),
        (["--max-model-len", "x"], "command line: argument --max-model-len"),
        (["--ssl-keyfile", "k"], "server.tls.certificate: is required"),
        (["--allow-credentials"], "server.cors.origins: is required"),
        (["--lora-modules", "sql"], "--lora-modules: neither NAME=PATH nor JSON"),
        (["--structured-outputs-config", "3"], "not a JSON object"),
        (["--lora-modules", "{"], "--lora-modules: "),
        (["--uvicorn-log-level", "shout"], "command line: argument --uvicorn-log-level"),
        (["--chat-template", "gone.jinja"], "--chat-template: neither a template text nor a file"),
        (["--root-path", "llm"], "server.root_path: has another form"),
        (["--return-tokens-as-token-ids"], "requests say it: `return_tokens_as_token_ids`"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert run(["serve", "org/model", *argv]) == 1
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


@pytest.mark.parametrize(
    "argv",
    [
        ["--structured-outputs-config", '{"disable_any_whitespace": true}'],
        ["--structured-outputs-config.disable_any_whitespace", "true"],
        ["--compilation-config.mode", "0"],
    ],
)
def test_our_defaults_hold_beside_part_of_a_config(tmp_path: Path, argv: list[str]) -> None:
    """VLLM's classes for these have a default of its own in every field, which we would refuse."""
    make_model(tmp_path, "llama", seed=1)
    _, engine = read(str(tmp_path), *argv)
    made = steered_engine_args(str(tmp_path), {}, **engine)
    assert made["structured_outputs_config"]["backend"] == "xgrammar"
    assert made["compilation_config"]["cudagraph_mode"] == "NONE"


def test_flags_without_effect_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="coxswain"):
        _, engine = read("org/m", "--max-log-len", "10", "--uvicorn-log-level", "info")
    assert not engine
    assert "--max-log-len has no effect: a log line has the whole prompt" in caplog.text
    assert "--uvicorn-log-level has no effect" in caplog.text


def test_a_refused_flag_at_its_default_is_taken() -> None:
    assert read("org/m", "--response-role", "assistant", "--no-enable-log-outputs")[1] == {}
    with pytest.raises(ConfigInvalid, match="--response-role: it is `assistant`"):
        read("org/m", "--response-role", "user")


def test_help_stands_in_groups_and_names_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["serve", "--help"])
    told = capsys.readouterr().out
    for words in ("address:", "TLS:", "chat:", "adapters:", "(server.port)", "--tool-call-parser",
                  "docs/reference/vllm-flags.md"):  # fmt: skip
        assert words in told


def test_version_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["--version"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("coxswain ") and "vllm" in told
