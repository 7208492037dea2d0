"""The sections of the configuration that say how a server is operated: sizes, times, limits, and
what it tells of itself. See `server.settings.config`.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters.registry.address import Address
from server.settings.paths import Absolute
from server.settings.redis import RedisUrl, address_of, check_ca_file


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, nothing changes after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rate(Section):
    """A caller's limits per minute. None: no limit."""

    requests_per_minute: int | None = Field(
        None,
        ge=1,
        description="Inference and tokenisation requests of one API key in a minute that begins "
        "with the first of them; one more: 429. Without `auth.api_keys`: of all clients together. "
        "Absent: any number.",
    )
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="Tokens, of prompts and replies together, of one API key in a minute. They "
        "count when their request ends; once they are used up: 429. Absent: any number.",
    )

    @property
    def limits(self) -> bool:
        """Whether there is any limit."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


class CorsConfig(Section):
    """Pages of other origins that may use the server from a browser."""

    origins: tuple[str, ...] = Field(
        min_length=1,
        description="Origins, e.g. `https://chat.example.org`; `*`: any.",
    )
    methods: tuple[str, ...] = Field(
        ("*",), min_length=1, description="HTTP methods that their pages may use; `*`: any."
    )
    headers: tuple[str, ...] = Field(
        ("*",),
        min_length=1,
        description="Request headers that their pages may send; `*`: any, `Authorization` too.",
    )
    credentials: bool = Field(
        False, description="Whether browsers send cookies along; not together with origin `*`."
    )

    @model_validator(mode="after")
    def _sound(self) -> CorsConfig:
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+|null", origin):
                raise ValueError(
                    f"origins: {origin[:80]!r} is no origin; it is scheme://host[:port], without "
                    "a path"
                )
        if self.credentials and "*" in self.origins:
            raise ValueError("credentials: name the origins; with `*` any page could act for its "
                             "visitors")  # fmt: skip
        return self


class TlsConfig(Section):
    """HTTPS by the server itself."""

    certificate: Absolute = Field(description="File of the certificate chain, PEM.")
    key: Absolute = Field(description="File of its private key, PEM, without a password.")
    client_ca: Absolute | None = Field(
        None, description="File of the certificates that clients' certificates are checked with."
    )
    clients: Literal["ignored", "optional", "required"] = Field(
        "ignored", description="Whether clients show a certificate of `client_ca`."
    )
    ciphers: str | None = Field(
        None, description="Ciphers for TLS 1.2, in OpenSSL's words. Absent: Python's choice."
    )
    refresh: bool = Field(False, description="Whether the files are read again when they change.")

    @model_validator(mode="after")
    def _checked(self) -> TlsConfig:
        if self.clients != "ignored" and self.client_ca is None:
            raise ValueError(f"clients: {self.clients} needs `client_ca`")
        return self


class ServerConfig(Section):
    """The HTTP side."""

    host: str = Field("127.0.0.1", description="Address to bind.")
    port: int = Field(8000, ge=0, le=65535, description="Port to bind; 0: any free one.")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of `/admin/*` and vLLM's two LoRA routes, at the same `host`; 0: any "
        "free one. They answer 404 on `port` then, and of the other paths this port has only "
        "`/metrics` and the probes. Absent: everything is on `port`.",
    )
    uds: Absolute | None = Field(
        None, description="Unix socket to listen on, in place of `host` and `port`."
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="Path under which a proxy shows the server, e.g. `/llm`; requests may come "
        "with or without it.",
    )
    tls: TlsConfig | None = Field(
        None,
        description="HTTPS by the server itself. Absent: HTTP, e.g. behind a proxy that ends TLS.",
    )
    cors: CorsConfig | None = Field(
        None, description="Pages of other origins that may use the server. Absent: none."
    )
    unknown_fields: Literal["ignore", "refuse"] = Field(
        "ignore",
        description="Whether unknown top-level fields of a request are ignored or refused. "
        "Unknown fields inside `steering` and `adapters` are always errors.",
    )
    template_workers: int = Field(
        2,
        ge=1,
        le=16,
        description="Processes that render chat templates of callers. One API key takes all but "
        "one of them at most, and keys take turns, so slow templates do not delay others.",
    )
    max_body_bytes: int = Field(
        4 * 1024 * 1024, ge=1024, description="Largest request body, in bytes; larger: 413."
    )
    max_in_flight: int = Field(
        1024,
        ge=1,
        description="Inference requests that may run or wait at the same time; one more: 429.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="How long running requests may finish after SIGTERM or POST /admin/drain, in "
        "seconds.",
    )
    drain_notice_s: float = Field(
        0.0,
        ge=0,
        le=600,
        description="How long `/ready` answers 503 before new requests are refused, in seconds: "
        "time for load balancers to notice. It comes before `drain_timeout_s`.",
    )
    keep_alive_s: int = Field(
        75,
        ge=1,
        le=3600,
        description="How long a connection without a request is kept, in seconds; longer than load "
        "balancers keep theirs (60 is usual), or they send requests into a closing one.",
    )
    head_timeout_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="How long a request's headers may take to arrive, in seconds; longer: 408, and "
        "the connection is closed.",
    )
    sse_keep_alive_s: float = Field(
        15.0,
        ge=0,
        le=3600,
        description="After how many seconds of silence a stream sends a comment, so that proxies "
        "do not take it for dead; a stream waits so long for its first token before its headers "
        "leave. 0: no comments, and the headers wait.",
    )
    engine_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="After how many seconds without an answer of the engine `/ready` answers "
        "503, until the engine answers again; more than the longest step and `counters_every_s`.",
    )
    counters_every_s: float = Field(
        2.0, gt=0, le=60, description="How often the worker's token counters are read, in seconds."
    )

    @model_validator(mode="after")
    def _ports(self) -> ServerConfig:
        if self.admin_port and self.admin_port == self.port and self.uds is None:
            raise ValueError(f"admin_port: {self.admin_port} is `port`; give another, or none")
        return self


class LimitsConfig(Rate):
    """Limits of one request, and of one caller."""

    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Longest prompt, in tokens; longer: 400. Absent: the context."
    )
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest reply, in tokens, and the default for requests without a length; "
        "more: 400. Absent: what the context leaves.",
    )
    max_replies: int = Field(
        1024,
        ge=1,
        description="Replies that one request may draw: its prompts times `n`, times what "
        "`best_of_n` draws for each, or `guided_search` at a time; more: 400.",
    )
    request_timeout_s: float = Field(
        600.0,
        gt=0,
        le=86400,
        description="How long one request may take from its first byte to the last of its answer, "
        "in seconds; then it is broken off: 504, or an error at the end of a stream.",
    )
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="How long a request's body may take to arrive, in seconds; longer: 408.",
    )
    redis: RedisUrl | None = Field(
        None,
        repr=False,
        description="The Redis in which replicas count requests and tokens per minute together; "
        "forms and password as of `registry.url`. Absent: `registry.url`; without that too, each "
        "replica counts for itself, as it does while Redis is away.",
    )
    redis_ca_file: Absolute | None = Field(None, description="As `registry.ca_file`, for `redis`.")

    @model_validator(mode="after")
    def _certificates(self) -> LimitsConfig:
        check_ca_file(self.redis, self.redis_ca_file, "redis_ca_file")
        return self

    @property
    def address(self) -> Address | None:
        """The Redis; None: none of its own."""
        return None if self.redis is None else address_of(self.redis, self.redis_ca_file)


class MetricsConfig(Section):
    """Optional measurements for `/metrics`."""

    report_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steered requests without a `report` that are measured all the "
        "same, for the series of KL, changed tokens and passes. Measuring makes the base's scores "
        "in every step of such a request. 0: only requests with a report are measured.",
    )


class LoggingConfig(Section):
    """Log lines on standard error."""

    format: Literal["text", "json"] = Field(
        "text", description="`json`: one object per line, with time, level, message, request id."
    )
    requests: bool = Field(
        False, description="Whether each inference request leaves a line when it ends."
    )
    prompts: bool = Field(
        False, description="Whether that line has the request's prompt or messages in full."
    )

    @model_validator(mode="after")
    def _line(self) -> LoggingConfig:
        if self.prompts and not self.requests:
            raise ValueError("prompts: goes with `requests: true`, whose lines they are put into")
        return self


class TracingConfig(Section):
    """OpenTelemetry traces. Absent: none."""

    endpoint: str = Field(
        pattern=r"^https?://.+",
        description="Where a collector takes OTLP: `http://host:4317`, or for `http/protobuf` "
        "`http://host:4318/v1/traces`.",
    )
    protocol: Literal["grpc", "http/protobuf"] = Field(
        "grpc", description="The collector's protocol."
    )
    sample: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the requests that are traced, where the caller's `traceparent` does "
        "not decide it.",
    )
    service_name: str = Field("coxswain", description="`service.name` of the traces.")
