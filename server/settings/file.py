"""Reads the configuration file: YAML, paths, the environment, and checks across sections."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from server.settings.config import ALIAS, NAME, RESERVED_ENGINE, Config, ConfigInvalid
from server.validation import is_unicode, problems
from steering.errors import BadValue
from steering.plan import BASE


def _names(config: Config) -> list[BadValue]:
    """Names that cannot be used."""
    found = []
    for section, names in (("streams", config.streams), ("profiles", config.profiles)):
        for name in names:
            if not NAME.fullmatch(name):
                found.append(
                    BadValue("not a usable name", field=f"{section}.{name}", value=name,
                             allowed="letters, digits, . _ : -; at most 64 characters")
                )  # fmt: skip
    for name, target in config.aliases.items():
        field = f"aliases.{name}"
        if not ALIAS.fullmatch(name):
            found.append(
                BadValue("not a usable name", field=field, value=name,
                         allowed="letters, digits, . _ : - and one /; at most 64 characters a part")
            )  # fmt: skip
        if name == config.name or name in config.profiles:
            found.append(BadValue("the name is taken", field=field))
        if target in config.aliases:
            found.append(BadValue("an alias of an alias", field=field, value=target))
    if BASE in config.streams:
        found.append(BadValue("the name is taken: it is the base model", field=f"streams.{BASE}"))
    if config.name in config.profiles:
        found.append(
            BadValue("a profile must not have the base's name", field=f"profiles.{config.name}")
        )
    return found


def _references(config: Config) -> list[BadValue]:
    """Streams that point to streams that are not there."""
    found = []
    for name, stream in config.streams.items():
        for field in ("same_as", "on"):
            target = getattr(stream, field)
            if target is not None and target != BASE and target not in config.streams:
                known = ", ".join([BASE, *sorted(config.streams)])
                found.append(
                    BadValue("no such stream", field=f"streams.{name}.{field}", value=target,
                             allowed=f"one of: {known}")
                )  # fmt: skip
    return found


def _reserved(config: Config) -> list[BadValue]:
    return [
        BadValue(f"not here: {why}", field=f"engine.{key}")
        for key, why in RESERVED_ENGINE.items()
        if key in config.engine
    ]


_BOOL = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (YAML would silently keep the last).

    Booleans are `true` and `false` alone, as in YAML 1.2: `on` is a key of streams.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != _BOOL]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    _BOOL, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, list | dict | set):
            raise ConfigInvalid([f"line {line}: a key must be text"])
        if key in seen:
            raise ConfigInvalid([f"line {line}: the key {key!r} is given twice"])
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _path(value: str, folder: Path) -> Path:
    """A path relative to the configuration file made absolute.

    Raises:
        ValueError: it cannot be one.
    """
    try:
        path = (folder / Path(value).expanduser()).resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long, a link to itself, somebody's home who is not here, a zero byte.
        why = getattr(error, "strerror", None) or str(error)[:200]
        raise ValueError(f"cannot be a path: {why}") from error
    return path


def _located(value: object, folder: Path) -> object:
    """A path made absolute; a Hugging Face id left alone."""
    if not isinstance(value, str) or not value:
        return value
    path = _path(value, folder)
    if value.startswith(("/", "./", "../", "~")) or path.exists():
        return str(path)
    return value


def _directories(value: object, folder: Path) -> object:
    """A folder, or a list of them, relative to the configuration file, made absolute."""
    if isinstance(value, list):
        return [_directories(each, folder) for each in value]
    return str(_path(value, folder)) if isinstance(value, str) else value


def _template(value: object, folder: Path) -> object:
    """A chat template: the text of a file, or the text itself."""
    if not isinstance(value, str) or "{" in value or "\n" in value:
        return value
    path = _path(value, folder)
    if not path.is_file():
        raise ValueError(f"neither a template text nor a file: {path}")
    return path.read_text(encoding="utf-8")


_LOCATED: tuple[tuple[tuple[str, ...], Callable[..., object]], ...] = (
    (("model",), _located),
    (("streams", "*", "model"), _located),
    (("streams", "*", "path"), _located),
    (("adapters", "roots"), _directories),
    (("adapters", "store"), _directories),
    (("adapters", "request_sources", "*"), _located),
    (("server", "uds"), _directories),
    (("server", "tls", "certificate"), _directories),
    (("server", "tls", "key"), _directories),
    (("server", "tls", "client_ca"), _directories),
    (("adapters", "preload", "*", "source"), _located),
    (("registry", "directory"), _directories),
    (("chat", "template"), _template),
    (("profiles", "*", "chat_template"), _template),
)
"""Settings that are paths, or may be; `*`: every entry."""


def _with_paths(data: object, folder: Path) -> Any:
    """The raw document with its paths resolved."""
    for keys, locate in _LOCATED:
        data = _changed(data, keys, partial(locate, folder=folder), "")
    return data


def _changed(
    data: object, keys: tuple[str, ...], change: Callable[[Any], object], where: str
) -> object:
    """A copy of `data` with the values at `keys`, where they are, changed.

    Raises:
        ConfigInvalid: a value cannot be; names its place.
    """
    if not keys:
        try:
            return data if data is None else change(data)
        except (OSError, ValueError) as error:
            raise ConfigInvalid([f"{where}: {error}"]) from error
    key, rest = keys[0], keys[1:]
    if isinstance(data, list) and key == "*":
        return [_changed(v, rest, change, f"{where}.{i}") for i, v in enumerate(data)]
    if not isinstance(data, dict):
        return data
    return {
        k: _changed(v, rest, change, f"{where}.{k}" if where else str(k)) if key in ("*", k) else v
        for k, v in data.items()
    }


def _with_environment(data: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Keys from the environment; they win over the file."""
    raw = data.get("auth")
    auth: dict[str, Any] = dict(raw) if isinstance(raw, dict) else {}
    keys = [key.strip() for key in environ.get("COXSWAIN_API_KEYS", "").split(",")]
    if any(keys):
        auth["api_keys"] = [key for key in keys if key]
    if admin := environ.get("COXSWAIN_ADMIN_KEY", "").strip():
        auth["admin_key"] = admin
    if isinstance(auth.get("api_keys"), str):
        auth["api_keys"] = [auth["api_keys"]]
    if raw is not None and not isinstance(raw, dict):
        return data
    return {**data, "auth": auth} if auth else data


_MOST_VALUES, _DEEPEST = 100_000, 64
"""What a document may hold. An alias counts wherever it stands: a few lines of them can stand for
billions of values."""


def _check_size(document: object) -> None:
    """Raises unless a document is small enough to be looked at from end to end, and all its text
    could be sent.

    Raises:
        ConfigInvalid: it is not.
    """
    pending, seen = [(document, 1)], 0
    while pending:
        value, depth = pending.pop()
        seen += 1
        if depth > _DEEPEST:
            raise ConfigInvalid([f"nested too deeply; allowed: {_DEEPEST} levels"])
        if seen > _MOST_VALUES:
            raise ConfigInvalid([f"more than {_MOST_VALUES} values, aliases counted each time"])
        if isinstance(value, str) and not is_unicode(value):
            raise ConfigInvalid(["a text has half a surrogate pair, which is no Unicode"])
        if isinstance(value, dict):
            pending += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list | tuple):
            pending += [(inner, depth + 1) for inner in value]


def parse(document: object, folder: Path, environ: Mapping[str, str] | None = None) -> Config:
    """The settings of a parsed YAML document.

    Args:
        document: what the YAML says.
        folder: what relative paths are relative to.
        environ: the environment; default: the process's.

    Raises:
        ConfigInvalid: with every problem found.
    """
    if not isinstance(document, dict):
        raise ConfigInvalid(["the configuration must be a mapping with at least `model`"])
    _check_size(document)
    data = _with_paths({str(key): value for key, value in document.items()}, folder)
    data = _with_environment(data, os.environ if environ is None else environ)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        found = problems([dict(e) for e in error.errors()])
        raise ConfigInvalid([str(p).removeprefix("body: ") for p in found]) from error
    wrong = [*_names(config), *_references(config), *_reserved(config)]
    if wrong:
        raise ConfigInvalid([str(p) for p in wrong])
    return config


def load(path: Path, environ: Mapping[str, str] | None = None) -> Config:
    """The settings of a file.

    Raises:
        ConfigInvalid: the file is missing, is not YAML, or says something impossible.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigInvalid([f"{path}: {error.strerror or error}"]) from error
    except ValueError as error:
        raise ConfigInvalid([f"{path}: not text in UTF-8: {error}"]) from error
    try:
        document = yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ConfigInvalid([f"{path}: nested too deeply"]) from error
    except (
        yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError,
    ) as error:  # fmt: skip
        # All but the first: what PyYAML lets slip for `!!int x`, `2026-13-01` and the like.
        raise ConfigInvalid([f"{path}: not YAML: {' '.join(str(error).split())[:600]}"]) from error
    return parse(document, path.resolve().parent, environ)
