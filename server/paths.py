"""Which paths ask the model for something, which need a key, and in whose shape they answer.

Everything that treats a path in its own way asks here.
"""

from __future__ import annotations

from starlette.types import Scope

_ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Paths beside `/admin` that belong to administration: vLLM's own."""

_TOKENS = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
"""Paths that only tokenise: they take the caller's rates, but draw nothing."""

_MODEL = ("/v1/", "/invocations", "/tokenize", "/detokenize")
"""Beginnings of paths that need an API key, count as in flight, and close while draining."""

_TOLD = ("/version", "/load")
"""Paths that need an API key as well, and tell of the server alone."""

PROBES = {"/health": ("GET", "HEAD"), "/ready": ("GET", "HEAD"), "/ping": ("GET", "HEAD", "POST")}
"""Paths that answer everybody, before there is an application, and their methods. `/ping` is what
SageMaker asks; it means the same as `/ready`."""

METRICS = "/metrics"
"""What Prometheus reads; it answers from the first moment, like the probes, but may need a key."""

MESSAGES = "/v1/messages"
"""Anthropic's API, whose errors have a shape of their own."""


def is_admin(path: str) -> bool:
    """Whether a path belongs to administration."""
    return path == "/admin" or path.startswith("/admin/") or path in _ADMIN


def is_model(path: str) -> bool:
    """Whether a path has to do with the model: its requests are counted as in flight, and refused
    while the server drains.
    """
    return path.startswith(_MODEL)


def needs_key(path: str) -> bool:
    """Whether a path needs an API key where there are some."""
    return is_model(path) or path in _TOLD


def takes_rates(scope: Scope) -> bool:
    """Whether a request counts for its caller's rates."""
    path: str = scope["path"]
    return scope["method"] == "POST" and is_model(path) and not is_admin(path)


def is_inference(scope: Scope) -> bool:
    """Whether a request asks the model for a reply: it is logged, counted and traced."""
    path: str = scope["path"]
    return takes_rates(scope) and path not in _TOKENS


def is_messages(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")
