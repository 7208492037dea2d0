"""vLLM's command-line flags behind `coxswain serve`: they win over the file's `engine` section."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import ValidationError

from server.settings.config import RESERVED_ENGINE, Config, ConfigInvalid
from server.settings.operating import ServerConfig
from server.validation import problems


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
    """The settings with what the command line says.

    Raises:
        ConfigInvalid: a port that cannot be.
    """
    given = {"host": host, "port": port}
    said = {name: value for name, value in given.items() if value is not None}
    try:
        server = ServerConfig.model_validate({**config.server.model_dump(), **said})
    except ValidationError as error:
        found = problems([dict(e) for e in error.errors()])
        raise ConfigInvalid([f"command line: --{problem}" for problem in found]) from error
    return config.model_copy(update={"server": server, "engine": {**config.engine, **engine}})
