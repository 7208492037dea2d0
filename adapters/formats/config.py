"""The config in an adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.errors import BadAdapter

CONFIG = "adapter_config.json"
"""PEFT's; MeteoRA's is in `adapters.formats.meteora`."""

_MOST_BYTES = 1 << 20


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of at most 1 MiB.

    Raises:
        BadAdapter: it is something else.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise BadAdapter("larger than 1 MiB", field=path.name)
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadAdapter(f"not JSON: {error}", field=path.name) from error
    if not isinstance(config, dict):
        raise BadAdapter("not a JSON object", field=path.name)
    return config


def bad_key(key: str, message: str, value: Any, allowed: str | None = None) -> BadAdapter:
    """The error that a key of PEFT's config deserves."""
    return BadAdapter(message, field=f"{CONFIG}: {key}", value=value, allowed=allowed)
