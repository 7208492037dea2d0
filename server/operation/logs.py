"""Log lines on standard error: text for people, or JSON for machines.

The engine's processes log with vLLM's own handlers; engine_logs.json beside this file gives them
the same form. Standard error stays free for what the operating system and native libraries write.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
from pathlib import Path

from asgi_correlation_id import correlation_id
from pythonjsonlogger.json import JsonFormatter

from server import errors
from server.console import JsonHandler
from server.context import RequestContext
from server.settings.operating import LoggingConfig

logger = logging.getLogger("coxswain.requests")

ENGINE = Path(__file__).with_name("engine_logs.json")
"""Logging of the engine's processes where lines are JSON."""

_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_NAMES = {"asctime": "time", "levelname": "level", "name": "logger", "exc_info": "exception"}


class _WithId(logging.Filter):
    """Puts the current request's id into records that are written while it is handled."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        identifier = correlation_id.get()
        if identifier and not hasattr(record, "request_id"):
            record.request_id = identifier
        return True


_PLAIN = re.compile(r"[!-~]+")
"""Text that can stand in a line of fields as it is: nothing in it ends a field or a line."""


def _written(value: object) -> str:
    """A field's value; what a client could forge lines or fields with is written as JSON."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) and '"' not in text else json.dumps(text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What ends a line on some terminals, moves their cursor, or reverses their text."""


def one_record(text: str) -> str:
    """A message whose further lines are indented, so that none can pass for a record."""
    lines = text.replace("\r\n", "\n").split("\n")
    escaped = [_CONTROL.sub(lambda match: repr(match[0])[1:-1], line) for line in lines]
    return "\n    ".join(escaped)


class Text(logging.Formatter):
    """`coxswain: message name=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and indented ones behind it."""
        text = super().format(record)
        fields: dict[str, object] = getattr(record, "fields", {})
        line = " ".join([text, *(f"{name}={_written(value)}" for name, value in fields.items())])
        return one_record(line)


class OneRecord(logging.Formatter):
    """As another formatter, vLLM's, whose messages may repeat what clients sent."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The other formatter's text; the message in it is one record."""
        safe = copy.copy(record)
        safe.msg, safe.args = one_record(record.getMessage()), None
        return self._inner.format(safe)


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
    handler.setFormatter(Text("coxswain: %(message)s"))
    ours.handlers, ours.propagate = [handler], False
    # Else Python writes what uvicorn and asyncio warn of as it is.
    others = logging.StreamHandler(sys.stderr)
    others.setLevel(logging.WARNING)
    others.setFormatter(Text("coxswain: %(levelname)s %(name)s: %(message)s"))
    root.handlers = [others]


def request_line(context: RequestContext, config: LoggingConfig, method: str, path: str) -> None:
    """Writes an inference request's line, if the configuration asks for it.

    Args:
        context: what is known of the request.
        config: section `logging`.
        method: of HTTP.
        path: of the request.
    """
    if not config.requests:
        return
    first = context.first_token_s
    fields: dict[str, object] = {
        "request_id": context.id,
        "http": f"{method} {path}",
        "status": context.status,
        "sent_status": context.sent_status,
        "failure": errors.code_of(context.failure) if context.failure is not None else None,
        "seconds": round(context.seconds, 4),
        "first_token_s": None if first is None else round(first, 4),
        "caller": context.access.caller,
        "model": context.model,
        "method": context.method,
        "profile": context.profile,
        "adapters": list(context.digests),
        "prompt_tokens": context.prompt_tokens,
        "output_tokens": context.output_tokens,
        "refusal": context.refusal,
    }
    if config.prompts:
        fields["prompt"] = context.prompt
    logger.info("request", extra={"fields": fields})
