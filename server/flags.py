"""vLLM's command-line flags behind `coxswain serve`: they win over the file's `engine` section."""

from __future__ import annotations

import argparse
from typing import Any

from server.config import RESERVED_ENGINE, Config, ConfigInvalid


def engine_flags(argv: list[str]) -> dict[str, Any]:
    """The engine arguments that were given, and only those.

    Args:
        argv: e.g. `['--max-model-len', '4096']`.

    Raises:
        ConfigInvalid: a flag that vLLM does not have, or that is ours.
    """
    if not argv:
        return {}
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    try:
        given, unknown = parser.parse_known_args(argv)
    except (argparse.ArgumentError, ValueError) as error:
        raise ConfigInvalid([f"command line: {error}"]) from error
    if unknown:
        raise ConfigInvalid([f"command line: vLLM has no flag {unknown[0]}"])
    found = dict(vars(given))
    for name in found:
        if name in RESERVED_ENGINE:
            raise ConfigInvalid([f"--{name.replace('_', '-')}: {RESERVED_ENGINE[name]}"])
    return found


def with_overrides(
    config: Config, host: str | None, port: int | None, engine: dict[str, Any]
) -> Config:
    """The settings with what the command line says."""
    server: dict[str, Any] = {}
    if host is not None:
        server["host"] = host
    if port is not None:
        server["port"] = port
    return config.model_copy(
        update={
            "server": config.server.model_copy(update=server),
            "engine": {**config.engine, **engine},
        }
    )
