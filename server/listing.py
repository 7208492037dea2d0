"""The commands that list things: profiles of a file or a server, installed methods."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.console import table


def profiles(source: str) -> int:
    """Prints the profiles of a configuration file or of a running server.

    Returns:
        The exit status.
    """
    if source.startswith(("http://", "https://")):
        found = _of_server(source)
        if found is None:
            return 1
    else:
        from server.config_file import load

        found = {name: {"origin": "config", **p.spec}
                 for name, p in load(Path(source)).profiles.items()}  # fmt: skip
    rows = [("profile", "origin", "method", "options")]
    for name, spec in found.items():
        options = ", ".join(
            f"{key}={value}"
            for key, value in spec.items()
            if key not in ("origin", "method", "name")
        )
        rows.append((name, str(spec["origin"]), str(spec["method"]), options))
    print(table(rows))
    return 0


def _of_server(url: str) -> Mapping[str, Mapping[str, Any]] | None:
    import httpx

    key = os.environ.get("COXSWAIN_ADMIN_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/admin/profiles", headers=headers, timeout=10)
    except httpx.HTTPError as error:
        print(f"coxswain: {url}: {error}", file=sys.stderr)
        return None
    if answer.status_code != 200:
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            message = "not an answer of Coxswain"
        print(f"coxswain: {url}: {answer.status_code}: {message}", file=sys.stderr)
        return None
    return {entry["name"]: entry for entry in answer.json()["profiles"]}


def methods(allow: list[str]) -> int:
    """Prints the installed methods with their options.

    Args:
        allow: distributions whose methods may load beside our own.

    Returns:
        The exit status.
    """
    from steering.plugins import PluginError, discover

    try:
        registry = discover(allow)
    except PluginError as error:
        print(f"coxswain: {error}", file=sys.stderr)
        return 1
    for name, plugin in registry.plugins.items():
        print(f"{name}  ({plugin.package} {plugin.version})")
        for field, info in plugin.method.config.model_fields.items():
            if field != "method":
                need = (
                    "required"
                    if info.is_required()
                    else f"default {info.get_default(call_default_factory=True)!r}"
                )
                print(f"    {field}: {info.description} ({need})")
        print()
    if registry.ignored:
        print(f"not allowed by --allow: {', '.join(registry.ignored)}")
    return 0
