"""`coxswain methods`: the installed methods with their options."""

from __future__ import annotations

import sys


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
