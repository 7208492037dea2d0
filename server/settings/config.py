"""The configuration file: what is served, read once at start, frozen.

Every setting has a default, a unit and a sentence; `docs/reference/configuration.md` is generated
from the descriptions below (`coxswain reference`). `server.settings.file` reads the file.
Needs pydantic only.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from adapters.registry.address import Address
from server.settings.auth import AuthConfig
from server.settings.operating import (
    LimitsConfig,
    LoggingConfig,
    MetricsConfig,
    Section,
    ServerConfig,
    TracingConfig,
)
from server.settings.paths import Absolute, Located, Template
from server.settings.redis import RedisUrl, address_of, check_ca_file
from server.settings.streams import StreamConfig
from steering.method import Limits
from steering.spec import Profile, Range

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
"""Names of streams and profiles: they appear in URLs and metric labels."""

ALIAS = re.compile(f"{NAME.pattern}(/{NAME.pattern})?")
"""Names of aliases: hub ids too."""

RESERVED_ENGINE = {
    "model": "use the top-level `model`",
    "served_model_name": "use the top-level `served_model_name`",
    "additional_config": "Coxswain sets it",
    "worker_extension_cls": "Coxswain sets it",
    "scheduler_cls": "Coxswain sets it",
    "disable_hybrid_kv_cache_manager": "Coxswain sets it",
    "hf_overrides": "Coxswain sets it",
    **dict.fromkeys(
        ("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        "use `steering.speculation`",
    ),
    "reasoning_parser": "use `chat.reasoning_parser`",
    **dict.fromkeys(
        (
            "enable_lora",
            "lora_modules",
            "max_loras",
            "max_cpu_loras",
            "max_lora_rank",
            "fully_sharded_loras",
            "lora_target_modules",
            "default_mm_loras",
        ),
        "use the section `adapters`",
    ),
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


class PreloadConfig(Section):
    """One adapter that is there from the start."""

    name: str = Field(description="What requests call it.")
    source: Located = Field(
        description="A folder (relative to this file), `hf://owner/name[@revision][/folder]`, "
        "`s3://bucket/folder` or `https://host/folder`."
    )
    version: str = Field("1", description="A label; requests may say `name@version`.")
    stream: str = Field("base", description="The stream whose layers it changes.")
    pin: bool = Field(False, description="Whether it is never evicted from the engine.")
    visible_to: tuple[str, ...] = Field(
        (),
        description="Groups of API keys that see and use it: the `group` of a key, or `key:` and "
        "the first 8 hex digits of its SHA-256. Empty: all.",
    )


class AdaptersConfig(Section):
    """LoRA adapters and MeteoRA packs. Absent: the engine runs without LoRA."""

    roots: tuple[Absolute, ...] = Field((), description="Directories that adapters may come from.")
    remotes: tuple[str, ...] = Field(
        (),
        description="Beginnings of sources elsewhere that are allowed: `hf://owner`, "
        "`s3://bucket/folder`, `https://host/folder`; `hf://` allows the whole hub.",
    )
    preload: tuple[PreloadConfig, ...] = Field(
        (),
        description="Adapters to load at start. One that cannot be served ends the start; one "
        "that is registered otherwise is replaced.",
    )
    load_on_request: bool = Field(
        False,
        description="Whether an adapter that a request names and nobody has registered is looked "
        "for in `request_sources`, and loaded.",
    )
    request_sources: tuple[Located, ...] = Field(
        (),
        description="Folders, and beginnings of sources elsewhere, in which `load_on_request` "
        "looks for `<source>/<name>`, in this order; each inside `roots` or `remotes`. `hf://`: "
        "names are `owner/name`. Absent: `roots`, then `remotes`.",
    )
    request_wait_s: float = Field(
        60.0,
        gt=0,
        description="How long a request waits for an adapter that `load_on_request` loads, in "
        "seconds; then it is refused with 503, and the load goes on.",
    )
    max_loaded: int = Field(
        8,
        ge=1,
        le=1024,
        description="Adapters (sets of them, where requests mix) that the engine holds at the "
        "same time. Any number may be ready; the least recently used make room. Each slot takes "
        "memory in every layer, used or not: see `coxswain doctor`.",
    )
    max_rank: int = Field(
        64,
        ge=1,
        le=512,
        description="Largest rank of what one request uses: of its adapters together, or of a "
        "pack: the sum of its adapters' ranks and their number.",
    )
    vectors: bool = Field(
        False,
        description="Whether adapters may change the residual stream behind each decoder layer: "
        "steering vectors, LoReFT. Takes memory in every slot, and a call in every layer.",
    )
    max_loaded_bytes: int = Field(
        8 << 30,
        ge=1,
        description="Largest size of the adapters in the engine together, in bytes.",
    )
    max_bytes: int = Field(
        4 << 30, ge=1, description="Largest size of one adapter, all its files together, in bytes."
    )
    fetch_timeout_s: float = Field(
        1800.0, gt=0, description="How long fetching one adapter may take, in seconds."
    )
    store: Absolute | None = Field(
        None,
        description="Directory of the adapters' copies, one folder per content; replicas may share "
        "it. Absent: `adapters` in `registry.directory`.",
    )
    s3_endpoint: str | None = Field(
        None, description="URL of an S3-compatible server. Absent: AWS."
    )


class RegistryConfig(Section):
    """Where adapters are recorded, for servers with adapters."""

    url: RedisUrl | None = Field(
        None,
        repr=False,
        description="A durable Redis that replicas share: `redis://host:port/database`, "
        "`redis+sentinel://host:port,host:port/service/database`, "
        "`redis+cluster://host:port,host:port`, each also with `rediss` (TLS), or `unix:///path`. "
        "The password: in the URL, or in the variable `COXSWAIN_REDIS_PASSWORD` (of the Sentinels: "
        "`COXSWAIN_SENTINEL_PASSWORD`). Absent: a file of this server's own.",
    )
    ca_file: Absolute | None = Field(
        None,
        description="Certificates (PEM) that are trusted instead of the system's, with `rediss`.",
    )
    namespace: str = Field(
        "coxswain",
        pattern=r"^[A-Za-z0-9_.:-]{1,64}$",
        description="One registry among several in one Redis.",
    )
    directory: Absolute | None = Field(
        None,
        description="Where a server without `url` keeps its registry, and any server its copies of "
        "adapters. Absent: `$XDG_STATE_HOME/coxswain/<name of the base>`.",
    )

    @model_validator(mode="after")
    def _certificates(self) -> RegistryConfig:
        check_ca_file(self.url, self.ca_file, "ca_file")
        return self

    @property
    def address(self) -> Address | None:
        """The Redis; None: a file."""
        return None if self.url is None else address_of(self.url, self.ca_file)


class SpeculationConfig(Section):
    """A stream drafts tokens, which one step of all streams verifies. Replies stay the steered
    model's own. Requests that do not use the stream go on without drafts; `min_p`, `logit_bias`
    and `top_n_sigma` are refused.
    """

    draft: str = Field(
        description="The stream that drafts, e.g. a profile's expert: a language model with a "
        "`model` of its own, much cheaper than the base."
    )
    tokens: int = Field(4, ge=1, le=16, description="Drafts per step.")


class SteeringConfig(Section):
    """Limits on callers' steering."""

    inline: bool = Field(
        True,
        description="Whether requests may bring methods and options of their own; "
        "false: profiles only.",
    )
    strength: Range = Field(
        (0.0, 10.0), description="Closed range for every `strength`; its lower end is at least 0."
    )
    weight: Range = Field((-10.0, 10.0), description="Closed range for every weight.")
    max_top_k: int = Field(
        64,
        ge=1,
        le=1024,
        description="Most candidates that a request may have value streams evaluate. Each value "
        "stream's key-value cache has two blocks more for each.",
    )
    max_best_of: int = Field(
        64,
        ge=1,
        le=1024,
        description="Most replies that a `best_of_n` request may choose from, and blocks that a "
        "`guided_search` request may draw at a time. They are drawn together, as far as "
        "`max_num_seqs` of the engine goes.",
    )
    speculation: SpeculationConfig | None = Field(
        None, description="A stream that drafts. Absent: every step draws one token."
    )
    one_product: list[list[str]] = Field(
        [],
        description="Sets of streams, e.g. `[[chat, plain]]`: a step in which all requests add "
        "just these to the base is read out in one matrix product. Each set takes a copy of the "
        "base's and its own unembeddings. Steps are 5 to 7 % shorter on CPUs (`make bench`); "
        "not measured on GPUs, where it does nothing.",
    )
    chat_templates: bool = Field(
        True,
        description="Whether requests may bring chat templates for streams. They are rendered in "
        "a process of their own, for at most 2 s and 512 MiB each.",
    )

    @model_validator(mode="after")
    def _not_negative(self) -> SteeringConfig:
        if self.strength[0] < 0:
            raise ValueError("strength: negative strengths undo a model's tuning; start at 0")
        return self

    @property
    def limits(self) -> Limits:
        """The ranges as the methods want them."""
        return Limits(self.strength, self.weight, self.max_top_k, self.max_best_of)


class ChatConfig(Section):
    """How chat requests are rendered and read."""

    template: Template | None = Field(
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
    default_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Variables that chat templates get where a request does not set them in its "
        "`chat_template_kwargs`, e.g. `{enable_thinking: false}`.",
    )

    @model_validator(mode="after")
    def _variables_alone(self) -> ChatConfig:
        taken = ("chat_template", "conversation", "messages", "tokenize", "tools")
        if wrong := [name for name in taken if name in self.default_template_kwargs]:
            raise ValueError(f"default_template_kwargs: {wrong[0]} is no variable of templates")
        return self


class _Profile(Profile):
    """A profile of the file: its template may be in a file of its own."""

    chat_template: Template | None = None


class Config(Section):
    """The whole file."""

    model: Located = Field(
        min_length=1,
        description="The base: folder (relative to this file) or Hugging Face id.",
    )
    served_model_name: str | None = Field(
        None, description="The base's name for clients. Absent: the last part of `model`."
    )
    aliases: dict[str, str] = Field(
        default_factory=dict,
        description="More names that clients may use: the name, and the base, profile or adapter "
        "that it stands for.",
    )
    streams: dict[str, StreamConfig] = Field(
        default_factory=dict, description="The streams beside the base, by name."
    )
    profiles: dict[str, _Profile] = Field(
        default_factory=dict, description="Named steering, by name; also served as models."
    )
    steering: SteeringConfig = Field(default_factory=SteeringConfig)
    auth: AuthConfig = Field(default_factory=AuthConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    tracing: TracingConfig | None = Field(None)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    playground: bool = Field(
        True, description="Whether `/playground` serves a page for trying steering by hand."
    )
    adapters: AdaptersConfig | None = Field(None)
    registry: RegistryConfig | None = Field(None)
    plugins: tuple[str, ...] = Field(
        (),
        description="Distributions whose steering methods may load (allow-list). Coxswain's "
        "own methods are always there.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="Any vLLM engine argument by its Python name, e.g. `max_model_len: 4096`. On "
        "a CPU, `kv_cache_memory_bytes` is by default room for 64 requests of full length, but "
        "at most half of the memory that is free.",
    )

    @property
    def name(self) -> str:
        """The base's name for clients."""
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]
