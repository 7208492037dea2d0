"""What becomes of each flag of `vllm serve`: a setting of ours, an engine argument, nothing, or a
refusal that names what there is instead. `docs/reference/vllm-flags.md` is made of this table.

Imports no vLLM: `coxswain serve --help` is as quick as the rest of the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.settings.paths import located, template

Form = Literal["text", "texts", "json", "switch"]


def _here(value: str) -> str:
    """A path of the command line: relative to where the command was given."""
    return str((Path.cwd() / Path(value).expanduser()).absolute())


def _model(value: str) -> str:
    return located(value, Path.cwd())


def _template(value: str) -> str:
    return template(value, Path.cwd())


_CLIENTS = {"0": "ignored", "1": "optional", "2": "required"}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that sets something of ours.

    Args:
        name: without dashes at its front.
        setting: dotted path of the setting; empty: `server.settings.flags` knows what to do.
        group: heading in `--help`.
        form: what follows the flag: a text, several, JSON, or nothing (and `--no-…`).
        read: makes the setting's value of the text.
        note: said in `--help` and in the table, beside the setting's own description.
        ours: whether vLLM does not have it.
    """

    name: str
    setting: str
    group: str
    form: Form = "text"
    read: Callable[[Any], Any] | None = None
    note: str = ""
    ours: bool = False

    @property
    def dest(self) -> str:
        """The name as Python has it."""
        return self.name.replace("-", "_")


_NET, _TLS, _CORS = "address", "TLS", "pages of other origins (CORS)"
_KEYS, _CHAT, _LORA, _LOGS = "model and keys", "chat", "adapters", "operation"

FLAGS: tuple[Flag, ...] = (
    Flag("host", "server.host", _NET),
    Flag("port", "server.port", _NET),
    Flag("admin-port", "server.admin_port", _NET, ours=True),
    Flag("uds", "server.uds", _NET, read=_here),
    Flag("root-path", "server.root_path", _NET),
    Flag("model", "model", _KEYS, read=_model, note="in place of CONFIG"),
    Flag("served-model-name", "", _KEYS, "texts",
         note="`served_model_name`; further names are `aliases` of it"),
    Flag("api-key", "auth.api_keys", _KEYS, "texts"),
    Flag("admin-key", "auth.admin_key", _KEYS, ours=True),
    Flag("chat-template", "chat.template", _CHAT, read=_template),
    Flag("chat-template-content-format", "chat.content_format", _CHAT),
    Flag("default-chat-template-kwargs", "chat.default_template_kwargs", _CHAT, "json"),
    Flag("enable-auto-tool-choice", "", _CHAT, "switch",
         note="on wherever `chat.tool_call_parser` is set; without it, refused"),
    Flag("tool-call-parser", "chat.tool_call_parser", _CHAT),
    Flag("reasoning-parser", "chat.reasoning_parser", _CHAT),
    Flag("enable-lora", "", _LORA, "switch", note="the section `adapters`, with its defaults"),
    Flag("lora-modules", "", _LORA, "texts",
         note="`adapters.preload`: NAME=FOLDER, NAME=owner/name of the hub, or JSON"),
    Flag("max-loras", "adapters.max_loaded", _LORA),
    Flag("max-lora-rank", "adapters.max_rank", _LORA),
    Flag("adapter-roots", "adapters.roots", _LORA, "texts", lambda v: [_here(path) for path in v],
         ours=True),
    Flag("adapter-remotes", "adapters.remotes", _LORA, "texts", ours=True),
    Flag("allowed-origins", "server.cors.origins", _CORS, "json"),
    Flag("allowed-methods", "server.cors.methods", _CORS, "json"),
    Flag("allowed-headers", "server.cors.headers", _CORS, "json"),
    Flag("allow-credentials", "server.cors.credentials", _CORS, "switch"),
    Flag("ssl-certfile", "server.tls.certificate", _TLS, read=_here),
    Flag("ssl-keyfile", "server.tls.key", _TLS, read=_here),
    Flag("ssl-ca-certs", "server.tls.client_ca", _TLS, read=_here),
    Flag("ssl-cert-reqs", "server.tls.clients", _TLS, read=lambda v: _CLIENTS.get(v, v),
         note="0 ignored, 1 optional, 2 required"),
    Flag("ssl-ciphers", "server.tls.ciphers", _TLS),
    Flag("enable-ssl-refresh", "server.tls.refresh", _TLS, "switch"),
    Flag("enable-log-requests", "logging.requests", _LOGS, "switch"),
    Flag("disable-log-requests", "logging.requests", _LOGS, "switch", read=lambda v: not v,
         note="the opposite; vLLM had it once", ours=True),
    Flag("shutdown-timeout", "server.drain_timeout_s", _LOGS),
    Flag("sse-keep-alive-interval", "server.sse_keep_alive_s", _LOGS),
    Flag("otlp-traces-endpoint", "tracing.endpoint", _LOGS),
)  # fmt: skip

NO_EFFECT: dict[str, str] = {
    "max_log_len": "a log line has the whole prompt or nothing of it: `logging.prompts`",
    "enable_prompt_tokens_details": "the details are always there",
    "enable_server_load_tracking": "load is always counted",
    "enable_tokenizer_info_endpoint": "the route is always there",
    "enable_request_id_headers": "`X-Request-Id` is always there",
    "enable_log_deltas": "replies are never logged",
    "cohere_is_reasoning_model": "there are no Cohere routes",
    "cohere_format": "there are no Cohere routes",
    "log_error_stack": "faults of the server always leave a traceback in its log",
    "uvicorn_log_level": "`logging` says what is logged",
    "disable_uvicorn_access_log": "requests leave lines where `logging.requests` says so",
    "disable_access_log_for_endpoints": "probes leave no lines",
    "h11_max_incomplete_event_size": "heads are bounded; for bodies: `server.max_body_bytes`",
    "h11_max_header_count": "heads are bounded",
    "enable_flash_late_interaction": "it is about pooling models",
    "max_cpu_loras": "adapters that are not in the engine lie on the disk: `adapters.store`",
}
"""Flags that are taken and do nothing, by their Python name, with what is so anyway."""

_REPLICAS = "one process is one engine; run servers with one `registry.url`"
_HTTP = "the server speaks HTTP only"
_PLUGIN = (
    "it runs a file of Python in the server; parsers come in a package, through vLLM's "
    "entry point `vllm.general_plugins`"
)
_FINGERPRINT = "replies have vLLM's own fingerprint"

REFUSED: dict[str, str] = {
    "middleware": "code in front of the routes could change what keys, limits and steering are "
    "checked on; put a proxy in front of the server",
    "config": "give Coxswain's own file as CONFIG; its `engine` section has vLLM's arguments",
    "headless": _REPLICAS,
    "api_server_count": _REPLICAS,
    "data_parallel_supervisor_port": _REPLICAS,
    "dp_supervisor_probe_interval_s": _REPLICAS,
    "dp_supervisor_probe_timeout_s": _REPLICAS,
    "dp_supervisor_probe_failure_threshold": _REPLICAS,
    "grpc": _HTTP,
    "grpc_port": _HTTP,
    "tokens_only": _HTTP,
    "enable_scale_out": "requests would pass the streams by",
    "trust_request_chat_template": "a caller's template of the base would be rendered in the "
    "server's own process; put `chat_template` into a profile",
    "trust_request_mm_kwargs": "prompts are text",
    "response_role": "it is `assistant`",
    "return_tokens_as_token_ids": "requests say it: `return_tokens_as_token_ids`",
    "exclude_tools_when_tool_choice_none": "leave `tools` out of the request",
    "tool_parser_plugin": _PLUGIN,
    "reasoning_parser_plugin": _PLUGIN,
    "tool_strict_level": "requests say it: `strict` of each tool",
    "tool_server": "the server runs no tools",
    "enable_per_request_metrics": "answers carry no times; `/metrics` and `logging.requests` do",
    "enable_force_include_usage": "requests say it: `stream_options.include_usage`",
    "enable_log_outputs": "replies are never logged",
    "anthropic_disabled_thinking_effort": "vLLM chooses it (`auto`)",
    "fingerprint_mode": _FINGERPRINT,
    "fingerprint_value": _FINGERPRINT,
    "disable_fastapi_docs": "`/docs` tells of the routes only; close it in a proxy",
    "enable_offline_docs": "`/docs` is FastAPI's own",
    "enable_sleep_mode": "the streams' heads are not restored when the engine wakes up",
}
"""Flags that are refused, by their Python name, and why. At vLLM's own default they say nothing and
are taken."""

NO_LONGER: dict[str, str] = {
    "task": "there is one: generating text",
    "guided_decoding_backend": "`engine: {structured_outputs_config: {backend: …}}`",
    "disable_frontend_multiprocessing": "see docs/internals/decisions/0003",
    "num_scheduler_steps": "each step draws one token; `steering.speculation` draws more",
    "swap_space": "vLLM has no such space any more",
}
"""Flags that earlier vLLMs had, which stand in many scripts; refused with what there is now."""
