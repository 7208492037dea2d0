"""What is written to standard error: lines for people, or JSON for machines.

The engine's processes log with vLLM's own handlers; engine_logs.json beside this file gives them
the same form. Standard error stays free for what the operating system and native libraries write.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter

from server.console import JsonHandler
from server.settings.operating import LoggingConfig
from server.trail import Trail, trail

logger = logging.getLogger("coxswain.requests")

ENGINE = Path(__file__).with_name("engine_logs.json")
"""Logging of the engine's processes where lines are JSON."""

_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_NAMES = {"asctime": "time", "levelname": "level", "name": "logger", "exc_info": "exception"}


class _WithId(logging.Filter):
    """Puts the current request's id into records that are written while it is handled."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        identifier = trail().id
        if identifier and not hasattr(record, "request_id"):
            record.request_id = identifier
        return True


class _Text(logging.Formatter):
    """`coxswain: message name=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        text = super().format(record)
        fields: dict[str, object] = getattr(record, "fields", {})
        return " ".join([text, *(f"{name}={value}" for name, value in fields.items())])


class _Json(JsonFormatter):
    """One object per line."""

    def __init__(self) -> None:
        super().__init__(_FORMAT, rename_fields=_NAMES, datefmt="%Y-%m-%dT%H:%M:%S%z")

    def process_log_record(self, log_data: dict[str, object]) -> dict[str, object]:
        """With a request's fields beside the others instead of inside one."""
        fields = log_data.pop("fields", None)
        return {**log_data, **fields} if isinstance(fields, dict) else log_data


def setup(config: LoggingConfig) -> None:
    """Installs handlers in this process, and for those that vLLM starts; before vLLM is imported.

    Args:
        config: section `logging`.
    """
    ours, root = logging.getLogger("coxswain"), logging.getLogger()
    ours.setLevel(logging.INFO)
    as_json = config.format == "json"
    handler = (JsonHandler if as_json else logging.StreamHandler)(sys.stderr)
    handler.addFilter(_WithId())
    if as_json:
        handler.setFormatter(_Json())
        root.handlers = [handler]
        logging.captureWarnings(True)
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(ENGINE))
        return
    handler.setFormatter(_Text("coxswain: %(message)s"))
    ours.handlers, ours.propagate = [handler], False


def request_line(noted: Trail, config: LoggingConfig, method: str, path: str, status: int) -> None:
    """Writes an inference request's line, if the configuration asks for it.

    Args:
        noted: what is known of the request.
        config: section `logging`.
        method: of HTTP.
        path: of the request.
        status: of its answer; 499: the client left before.
    """
    if not config.requests:
        return
    first = noted.first_token_s
    fields: dict[str, object] = {
        "request_id": noted.id,
        "http": f"{method} {path}",
        "status": status,
        "seconds": round(noted.seconds, 4),
        "first_token_s": None if first is None else round(first, 4),
        "caller": noted.caller,
        "model": noted.model,
        "method": noted.method,
        "profile": noted.profile,
        "adapters": list(noted.digests),
        "prompt_tokens": noted.prompt_tokens,
        "output_tokens": noted.output_tokens,
        "refusal": noted.refusal,
    }
    if config.prompts:
        fields["prompt"] = noted.prompt
    logger.info("request", extra={"fields": fields})
