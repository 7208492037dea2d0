"""Reads the configuration file: YAML, paths, the environment, and checks across sections."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from server.config import NAME, RESERVED_ENGINE, Config, ConfigInvalid
from server.validation import problems
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
        if key in seen:
            line = key_node.start_mark.line + 1
            raise ConfigInvalid([f"line {line}: the key {key!r} is given twice"])
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _located(value: object, folder: Path) -> object:
    """A path relative to the configuration file made absolute; a Hugging Face id left alone."""
    if not isinstance(value, str) or not value:
        return value
    path = (folder / Path(value).expanduser()).resolve()
    if value.startswith(("/", "./", "../", "~")) or path.exists():
        return str(path)
    return value


_DIRECTORIES = {"adapters": ("roots", "store"), "registry": ("directory",)}
"""Settings that are folders, never ids."""


def _directories(value: object, folder: Path) -> object:
    """A folder, or a list of them, relative to the configuration file, made absolute."""
    if isinstance(value, list):
        return [_directories(each, folder) for each in value]
    return str((folder / Path(value).expanduser()).resolve()) if isinstance(value, str) else value


def _with_source(entry: object, folder: Path) -> object:
    """An adapter to preload whose source, if it is a folder, is absolute."""
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        return entry
    return {**entry, "source": _located(entry["source"], folder)}


def _template(value: object, folder: Path) -> object:
    """A chat template: the text of a file, or the text itself."""
    if not isinstance(value, str) or "{" in value or "\n" in value:
        return value
    path = (folder / Path(value).expanduser()).resolve()
    if not path.is_file():
        raise ValueError(f"neither a template text nor a file: {path}")
    return path.read_text(encoding="utf-8")


def _with_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The raw document with its paths resolved."""
    data = dict(data)
    if "model" in data:
        data["model"] = _located(data["model"], folder)
    if isinstance(streams := data.get("streams"), dict):
        data["streams"] = {
            name: {
                key: _located(value, folder) if key in ("model", "path") else value
                for key, value in stream.items()
            }
            if isinstance(stream, dict)
            else stream
            for name, stream in streams.items()
        }
    for name, keys in _DIRECTORIES.items():
        if isinstance(section := data.get(name), dict):
            data[name] = {
                key: _directories(value, folder) if key in keys else value
                for key, value in section.items()
            }
    section = data.get("adapters")
    if isinstance(section, dict) and isinstance(section.get("preload"), list):
        preload = [_with_source(entry, folder) for entry in section["preload"]]
        data["adapters"] = {**section, "preload": preload}
    places = [("chat", "template", data.get("chat"))]
    if isinstance(profiles := data.get("profiles"), dict):
        data["profiles"] = profiles = dict(profiles)
        places += [(f"profiles.{name}", "chat_template", p) for name, p in profiles.items()]
    for where, key, section in places:
        if isinstance(section, dict) and section.get(key) is not None:
            try:
                read = {**section, key: _template(section[key], folder)}
            except (ValueError, OSError) as error:
                raise ConfigInvalid([f"{where}.{key}: {error}"]) from error
            if where == "chat":
                data["chat"] = read
            else:
                data["profiles"][where.removeprefix("profiles.")] = read
    return data


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
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigInvalid([f"{path}: not YAML: {' '.join(str(error).split())}"]) from error
    return parse(document, path.resolve().parent, environ)
