"""Reads the configuration: the file, the environment and the command line, each over the one
before; then checks across sections.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.settings.config import ALIAS, NAME, RESERVED_ENGINE, Config, ConfigInvalid
from server.settings.environment import from_environment
from server.settings.yaml_text import read_yaml
from server.validation import is_unicode, problems
from steering.errors import BadValue
from steering.plan import BASE


def _names(config: Config) -> list[BadValue]:
    """Names that cannot be used."""
    errors = []
    for section, names in (("streams", config.streams), ("profiles", config.profiles)):
        for name in names:
            if not NAME.fullmatch(name):
                errors.append(
                    BadValue("not a usable name", field=f"{section}.{name}", value=name,
                             allowed="letters, digits, . _ : -; at most 64 characters")
                )  # fmt: skip
    for name, target in config.aliases.items():
        field = f"aliases.{name}"
        if not ALIAS.fullmatch(name):
            errors.append(
                BadValue("not a usable name", field=field, value=name,
                         allowed="letters, digits, . _ : - and one /; at most 64 characters a part")
            )  # fmt: skip
        if name == config.name or name in config.profiles:
            errors.append(BadValue("the name is taken", field=field))
        if target in config.aliases:
            errors.append(BadValue("an alias of an alias", field=field, value=target))
    if BASE in config.streams:
        errors.append(BadValue("the name is taken: it is the base model", field=f"streams.{BASE}"))
    if config.name in config.profiles:
        errors.append(
            BadValue("a profile must not have the base's name", field=f"profiles.{config.name}")
        )
    return errors


def _references(config: Config) -> list[BadValue]:
    """Streams that point to streams that are not there."""
    errors = []
    for name, stream in config.streams.items():
        for field in ("same_as", "on"):
            target = getattr(stream, field)
            if target is not None and target != BASE and target not in config.streams:
                names = ", ".join([BASE, *sorted(config.streams)])
                errors.append(
                    BadValue("no such stream", field=f"streams.{name}.{field}", value=target,
                             allowed=f"one of: {names}")
                )  # fmt: skip
    return errors


def _reserved(config: Config) -> list[BadValue]:
    return [
        BadValue(f"not here: {why}", field=f"engine.{key}")
        for key, why in RESERVED_ENGINE.items()
        if key in config.engine
    ]


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


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings over others: objects are merged key by key, all else is replaced."""
    settings = dict(below)
    for key, value in above.items():
        under = settings.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = merged(under, value)
        settings[key] = value
    return settings


def _with_adapters(below: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says over `below`; adapters that it names are added."""
    data, under, over = merged(below, flags), below.get("adapters"), flags.get("adapters")
    if isinstance(under, Mapping) and isinstance(over, Mapping):
        for key in ("preload", "roots", "remotes"):
            if isinstance(under.get(key), list) and key in over:
                data["adapters"][key] = [*under[key], *over[key]]
    return data


_SECRET = ("auth", "registry.url", "limits.redis")
"""Settings that are, or may hold, keys and passwords: what stands there belongs in no log."""


def _without_secrets(error: Mapping[str, Any]) -> dict[str, Any]:
    """A finding of pydantic's without its input where that is a secret, or holds one."""
    path = ".".join(str(part) for part in error["loc"]) + "."
    near = any(
        (secret + ".").startswith(path) or path.startswith(secret + ".") for secret in _SECRET
    )
    return {**error, "input": None} if near or path == "." else dict(error)


def parse(
    document: object,
    folder: Path,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The settings of a parsed YAML document.

    Args:
        document: what the YAML says.
        folder: what relative paths are relative to.
        environ: the environment, which wins over the document; default: the process's.
        flags: what the command line says, nested as the document; wins over both.

    Raises:
        ConfigInvalid: with every problem found.
    """
    if not isinstance(document, dict):
        raise ConfigInvalid(["the configuration must be a mapping with at least `model`"])
    _check_size(document)
    data = {str(key): value for key, value in document.items()}
    data = merged(data, from_environment(os.environ if environ is None else environ))
    _check_size(flags or {})
    data = _with_adapters(data, flags or {})
    auth = data.get("auth")
    if isinstance(auth, dict) and isinstance(auth.get("api_keys"), str):
        data["auth"] = {**auth, "api_keys": [auth["api_keys"]]}
    try:
        config = Config.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        errors = problems([_without_secrets(dict(e)) for e in error.errors()])
        raise ConfigInvalid([str(p).removeprefix("body: ") for p in errors]) from error
    wrong = [*_names(config), *_references(config), *_reserved(config)]
    if wrong:
        raise ConfigInvalid([str(p) for p in wrong])
    return config


def load(
    path: Path,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
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
        document = read_yaml(text)
    except ValueError as error:
        raise ConfigInvalid([f"{path}: {error}"]) from error
    return parse(document, path.resolve().parent, environ, flags)
