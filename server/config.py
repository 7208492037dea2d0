"""The configuration file: what is served, read once at start, frozen.

Every setting has a default, a unit and a sentence; `docs/configuration.md` is generated from the
descriptions below (`coxswain reference`). Needs pydantic and PyYAML only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from server.validation import problems
from steering.errors import BadValue
from steering.method import Limits
from steering.plan import BASE
from steering.spec import Profile, Range

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
"""Names of streams and profiles: they appear in URLs and metric labels."""

RESERVED_ENGINE = {
    "model": "use the top-level `model`",
    "served_model_name": "use the top-level `served_model_name`",
    "additional_config": "Coxswain sets it",
    "worker_extension_cls": "Coxswain sets it",
    "disable_hybrid_kv_cache_manager": "Coxswain sets it",
    "hf_overrides": "Coxswain sets it",
}
"""Engine arguments that the server fills in itself, and what to do instead."""


class ConfigInvalid(Exception):
    """The configuration cannot be used.

    Args:
        problems: one line each, naming the field.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, nothing changes after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StreamConfig(Section):
    """One stream beside the base. Give exactly one of `model`, `same_as`, `on`."""

    model: str | None = Field(
        None, description="Folder (relative to this file) or Hugging Face id of a companion model."
    )
    same_as: str | None = Field(
        None,
        description="Another stream whose weights are used again, with a key-value cache of its "
        "own: for another prompt, or without the adapter. At present only `base`.",
    )
    on: str | None = Field(
        None, description="The stream whose last hidden state a classifier head reads."
    )
    head: Literal["value", "classifier"] | None = Field(
        None, description="What the stream computes instead of token scores. Absent: token scores."
    )
    path: str | None = Field(None, description="Folder of the classifier head, with `on`.")

    @model_validator(mode="after")
    def _one_source(self) -> StreamConfig:
        given = [name for name in ("model", "same_as", "on") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of model, same_as, on; got {', '.join(given) or 'none'}"
            )
        if self.on is not None and (self.head is None or self.path is None):
            raise ValueError("`on` needs `head` and `path`")
        return self


class AdaptersConfig(Section):
    """LoRA adapters (not served yet: a server with this section refuses to start)."""

    roots: tuple[str, ...] = Field((), description="Directories that adapters may come from.")
    preload: tuple[dict[str, Any], ...] = Field(
        (), description="Adapters to load at start: objects with `name` and `source`."
    )
    max_loaded: int = Field(8, ge=1, description="Adapters held in memory at the same time.")
    max_rank: int = Field(64, ge=1, description="Largest LoRA rank accepted.")


class RegistryConfig(Section):
    """Where adapters and profiles are recorded (only the embedded registry is served yet)."""

    url: str | None = Field(
        None, description="`redis://…` of a shared registry. Absent: in this process's memory."
    )


class SteeringConfig(Section):
    """What callers may ask for."""

    inline: bool = Field(
        True,
        description="Whether requests may bring methods and options of their own; "
        "false: profiles only.",
    )
    strength: Range = Field(
        (0.0, 10.0), description="Closed range for every `strength`; its lower end is at least 0."
    )
    weight: Range = Field((-10.0, 10.0), description="Closed range for every weight.")
    chat_templates: bool = Field(
        True,
        description="Whether requests may bring chat templates for streams (sandboxed Jinja; a "
        "hostile template can still cost processor time).",
    )

    @model_validator(mode="after")
    def _not_negative(self) -> SteeringConfig:
        if self.strength[0] < 0:
            raise ValueError("strength: negative strengths undo a model's tuning; start at 0")
        return self

    @property
    def limits(self) -> Limits:
        """The ranges as the methods want them."""
        return Limits(strength=self.strength, weight=self.weight)


class AuthConfig(Section):
    """Keys. An empty list and no key mean: no authentication."""

    api_keys: tuple[SecretStr, ...] = Field(
        (),
        description="Keys for `/v1/*` and tokenisation (environment: `COXSWAIN_API_KEYS`, "
        "separated by commas).",
    )
    admin_key: SecretStr | None = Field(
        None,
        description="Key for `/admin/*` (environment: `COXSWAIN_ADMIN_KEY`). Without one the "
        "admin API answers only when the server is bound to loopback.",
    )


class ServerConfig(Section):
    """The HTTP side."""

    host: str = Field("127.0.0.1", description="Address to bind.")
    port: int = Field(8000, ge=0, le=65535, description="Port to bind; 0: any free one.")
    max_body_bytes: int = Field(
        4 * 1024 * 1024, ge=1024, description="Largest request body, in bytes; larger: 413."
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="How long running requests may finish after SIGTERM, in seconds.",
    )
    counters_every_s: float = Field(
        2.0, gt=0, le=60, description="How often the worker's token counters are read, in seconds."
    )


class ChatConfig(Section):
    """How chat requests are rendered and read."""

    template: str | None = Field(
        None,
        description="Jinja chat template for the base (file relative to this one, or text). "
        "Absent: the tokenizer's own.",
    )
    content_format: Literal["auto", "string", "openai"] = Field(
        "auto", description="How message content is given to the template."
    )
    tool_call_parser: str | None = Field(
        None,
        description="vLLM tool parser for the base, e.g. `hermes`; turns on tool choice `auto`.",
    )
    reasoning_parser: str | None = Field(None, description="vLLM reasoning parser for the base.")


class Config(Section):
    """The whole file."""

    model: str = Field(
        min_length=1,
        description="The base: folder (relative to this file) or Hugging Face id.",
    )
    served_model_name: str | None = Field(
        None, description="What clients call the base. Absent: the last part of `model`."
    )
    streams: dict[str, StreamConfig] = Field(
        default_factory=dict, description="The streams beside the base, by name."
    )
    profiles: dict[str, Profile] = Field(
        default_factory=dict, description="Named steering, by name; also served as models."
    )
    steering: SteeringConfig = Field(default_factory=SteeringConfig)
    auth: AuthConfig = Field(default_factory=AuthConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    adapters: AdaptersConfig | None = Field(None)
    registry: RegistryConfig | None = Field(None)
    plugins: tuple[str, ...] = Field(
        (),
        description="Distributions whose steering methods may load (allow-list). Coxswain's "
        "own methods are always there.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Any vLLM engine argument by its Python name, e.g. `max_model_len: 4096`.",
    )

    @property
    def name(self) -> str:
        """What clients call the base."""
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]


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


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (YAML would silently keep the last)."""


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
