"""`coxswain serve`'s command line: flags of ours and of vLLM, over the file and the environment."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from server.settings.config import RESERVED_ENGINE, ConfigInvalid
from server.settings.file import merged
from server.settings.vllm_flags import FLAGS, NO_EFFECT, NO_LONGER, REFUSED

logger = logging.getLogger("coxswain")


def add_flags(parser: argparse.ArgumentParser, described: dict[str, str]) -> None:
    """Adds the flags that set something of ours, in groups.

    Args:
        parser: of `coxswain serve`.
        described: sentences by setting, for the help.
    """
    groups: dict[str, Any] = {}
    for flag in FLAGS:
        group = groups.get(flag.group) or parser.add_argument_group(flag.group)
        groups[flag.group] = group
        text = described.get(flag.setting, "") or flag.note
        where = f" ({flag.setting})" if flag.setting else ""
        forms: dict[str, dict[str, Any]] = {
            "text": {"metavar": "X"},
            "texts": {"nargs": "+", "action": "extend", "metavar": "X"},
            "json": {"type": _json, "metavar": "JSON"},
            "switch": {"action": argparse.BooleanOptionalAction},
        }
        group.add_argument(f"--{flag.name}", default=argparse.SUPPRESS,
                           help=(text + where).replace("%", "%%"), **forms[flag.form])  # fmt: skip


_OBJECTS = ("structured_outputs_config", "compilation_config")
"""Engine arguments to which we add defaults of ours: as the file has them, not as vLLM's classes,
which already have its own in every field.
"""


def _object(text: str) -> object:
    value = _json(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object (got {text[:80]!r})")
    return value


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON (got {text[:80]!r}): {error}") from error


def dashed(argv: Sequence[str]) -> list[str]:
    """Flags with `_` for `-` as vLLM takes them too: `--max_model_len`."""
    arguments = []
    for argument in argv:
        name, sign, value = argument.partition("=")
        head, dot, rest = name.partition(".")
        flag = head.startswith("--") and len(head) > 2
        arguments.append((head.replace("_", "-") + dot + rest + sign + value) if flag else argument)
    return arguments


def from_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags' settings, nested as in the configuration file.

    Raises:
        ConfigInvalid: a value cannot be read.
    """
    settings: dict[str, Any] = {}
    for flag in FLAGS:
        value = getattr(args, flag.dest, None)
        if value is None:
            continue
        try:
            setting = flag.read(value) if flag.read else value
            nested = _nested(flag.setting, setting) if flag.setting else _ELSE[flag.dest](value)
        except ValueError as error:
            raise ConfigInvalid([f"--{flag.name}: {error}"]) from error
        settings = merged(settings, nested)
    return settings


def _nested(path: str, value: object) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _names(names: list[str]) -> dict[str, Any]:
    first, *others = names
    return {"served_model_name": first, **({"aliases": dict.fromkeys(others, first)} if others
                                           else {})}  # fmt: skip


def _adapters(on: bool) -> dict[str, Any]:
    return {"adapters": {} if on else None}


def _modules(modules: list[str]) -> dict[str, Any]:
    """`--lora-modules`; each source is allowed, because the operator names it."""
    section: dict[str, list[Any]] = {"preload": [], "roots": [], "remotes": []}
    for text in modules:
        name, sign, path = text.partition("=")
        if text.startswith("{"):
            entry = json.loads(text)
            name, sign, path = str(entry.get("name", "")), "=", str(entry.get("path", ""))
        if not (name and sign and path):
            raise ValueError(f"neither NAME=PATH nor JSON with name and path (got {text[:80]!r})")
        folder = (Path.cwd() / Path(path).expanduser()).absolute()
        source = path if "://" in path else str(folder) if folder.is_dir() else f"hf://{path}"
        section["preload"].append({"name": name, "source": source})
        section["remotes" if "://" in source else "roots"].append(source)
    return {"adapters": {key: value for key, value in section.items() if value}}


_ELSE: dict[str, Any] = {
    "served_model_name": _names,
    "enable_auto_tool_choice": lambda on: {},
    "enable_lora": _adapters,
    "lora_modules": _modules,
}
"""What flags do that set no single setting."""


def check_tool_choice(args: argparse.Namespace, parser: str | None) -> None:
    """`--enable-auto-tool-choice` against what the configuration has.

    Raises:
        ConfigInvalid: no parser reads the calls, or it is off while one does.
    """
    enabled = getattr(args, "enable_auto_tool_choice", None)
    if enabled is not None and enabled != (parser is not None):
        raise ConfigInvalid(
            ["--enable-auto-tool-choice: needs chat.tool_call_parser (--tool-call-parser)"]
            if enabled
            else ["--no-enable-auto-tool-choice: leave chat.tool_call_parser out"]
        )


def engine_flags(argv: list[str]) -> dict[str, Any]:
    """The engine arguments that were given, and only those. Imports vLLM.

    Args:
        argv: what `add_flags` left, e.g. `['--max-model-len', '4096']`.

    Raises:
        ConfigInvalid: a flag that nobody has, that is refused, or whose value cannot be read.
    """
    if not argv:
        return {}
    parser, fields = vllm_parser(), engine_fields()
    defaults = {action.dest: action.default for action in parser._actions}
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.dest in _OBJECTS:
            action.type = _object
    try:
        values = dict(vars(parser.parse_args(argv)))
    except (ValueError, IndexError) as error:
        raise ConfigInvalid([f"command line: {error}"]) from error
    wrong, engine = [], {}
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        why = REFUSED.get(name) or RESERVED_ENGINE.get(name)
        if name == "model_tag":
            wrong.append(f"command line: {value}: give CONFIG, or a model, first")
        elif why and (name in RESERVED_ENGINE or value != defaults[name]):
            wrong.append(f"{flag}: {why}")
        elif name in NO_EFFECT:
            logger.warning("%s has no effect: %s", flag, NO_EFFECT[name])
        elif not why and name not in fields:
            wrong.append(f"{flag}: this flag of vLLM is not known here")
        elif not why:
            engine[name] = value
    if wrong:
        raise ConfigInvalid(wrong)
    return engine


_PARSERS = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")
"""Modules that have `make_arg_parser`: that of vLLM 0.32, and that of 0.33."""


def vllm_parser() -> Any:
    """VLLM's own parser of `vllm serve`, which does not end the process."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    where = next(filter(importlib.util.find_spec, _PARSERS))
    make_arg_parser = importlib.import_module(where).make_arg_parser

    class Parser(FlexibleArgumentParser):
        def _pull_args_from_config(self, args: list[str]) -> list[str]:
            return args  # `--config` is refused, not read

        def error(self, message: str) -> NoReturn:
            first = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
            if message.startswith("unrecognized arguments: "):
                raise ConfigInvalid([f"command line: {_unknown(first, self)}"])
            raise ConfigInvalid([f"command line: {message}"])

    # `error` does not end the process, so every fault may go through it: with `exit_on_error` off
    # Python 3.13 raises some past it.
    return make_arg_parser(Parser(add_help=False, allow_abbrev=False))


def engine_fields() -> frozenset[str]:
    """Names of the engine arguments that vLLM has. Imports vLLM."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return frozenset(field.name for field in dataclasses.fields(AsyncEngineArgs))


def _unknown(flag: str, parser: argparse.ArgumentParser) -> str:
    why = NO_LONGER.get(flag.lstrip("-").replace("-", "_"))
    if why is not None:
        return f"there is no flag {flag} any more: {why}"
    options = [*(f"--{f.name}" for f in FLAGS), *parser._option_string_actions]
    near = difflib.get_close_matches(flag, options, n=1)
    return f"there is no flag {flag}" + (f"; is it {near[0]}?" if near else "")
