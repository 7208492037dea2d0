"""The command line. Light: vLLM's worker processes import this module again (spawn)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands import adapters, profiles, status, train

if TYPE_CHECKING:
    from server.settings.config import Config

# vLLM says that it does without Triton before its logging is set up, in every process.
logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)

_EPILOG = """\
examples:
  coxswain doctor zoo.yaml                 check a configuration before anything is loaded
  coxswain serve zoo.yaml                  serve it on 127.0.0.1:8000
  coxswain serve zoo.yaml --port 9000 --max-model-len 4096
                                           any vLLM engine flag may follow; it wins over the file
  coxswain profiles list zoo.yaml          the profiles of a configuration
  coxswain profiles list                   those of the running server; also show, put, delete
  coxswain adapters list                   the adapters of a running server; also load, unload …
  coxswain status                          how the running server is
  coxswain drain                           lets it finish what runs, and end
  coxswain methods                         the installed steering methods and their options
  coxswain train meteora --help            gates that choose among your LoRA adapters
  coxswain train value --help              a value model from your own reward
  coxswain train critic --help             a classifier of critical tokens from your own rule

A minimal configuration:
  model: ./models/big
  streams:
    chat:  {model: ./models/small-chat}
    plain: {model: ./models/small}
  profiles:
    big-chat: {method: proxy_tuning, expert: chat, anti_expert: plain, strength: 1.0}

Keys come from the file's `auth` section or from COXSWAIN_API_KEYS and COXSWAIN_ADMIN_KEY.
All settings: docs/configuration.md, or `coxswain reference`.
"""


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="coxswain",
        description="Serves a language model and steers it, per request, with small tuned models.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve a configuration", formatter_class=raw, epilog=_EPILOG,
        usage="coxswain serve CONFIG [--host HOST] [--port PORT] [any vLLM engine flag …]",
    )  # fmt: skip
    serve.add_argument("config", metavar="CONFIG", type=Path, help="the YAML file")
    serve.add_argument("--host", help="address to bind (default: the file's, else 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to bind (default: the file's, else 8000)")
    doctor = commands.add_parser("doctor", help="check a configuration; exit 1 with reasons")
    doctor.add_argument("config", metavar="CONFIG", type=Path, help="the YAML file")
    methods = commands.add_parser("methods", help="list the steering methods and their options")
    methods.add_argument("--allow", action="append", default=[], metavar="PACKAGE",
                         help="a distribution whose methods may load")  # fmt: skip
    profiles.add(commands)
    adapters.add(commands)
    status.add(commands)
    train.add(commands)
    commands.add_parser("reference", help="print all settings as Markdown")
    return top


def main(argv: list[str] | None = None) -> None:
    """Runs one command and ends the process with its status."""
    status = run(sys.argv[1:] if argv is None else argv)
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips the interpreter's teardown, where vLLM's native libraries print lists of leaks.
    os._exit(status)


def run(argv: list[str]) -> int:
    """Runs one command.

    Returns:
        The exit status.
    """
    from server.settings.config import ConfigInvalid

    given, rest = parser().parse_known_args(argv)
    if rest and given.command != "serve":
        parser().error(f"unknown arguments: {' '.join(rest)}")
    try:
        return _commands(given, rest)
    except ConfigInvalid as error:
        for problem in error.problems:
            print(f"coxswain: {problem}", file=sys.stderr)
        return 1


def _commands(given: argparse.Namespace, rest: list[str]) -> int:
    if given.command == "serve":
        return _serve(given, rest)
    if given.command == "doctor":
        return _doctor(given.config)
    if given.command == "methods":
        from server.commands.methods import methods

        return methods(given.allow)
    by_name = {
        "adapters": adapters.run,
        "profiles": profiles.run,
        "status": status.run,
        "drain": status.run,
        "train": train.run,
    }
    if given.command in by_name:
        return by_name[given.command](given)
    from server.settings.reference import reference

    print(reference(), end="")
    return 0


def _serve(given: argparse.Namespace, rest: list[str]) -> int:
    from server.launch import serve
    from server.loading import environment
    from server.operation.logs import setup
    from server.settings.file import load
    from server.settings.flags import engine_flags, with_overrides

    config: Config = load(given.config)
    setup(config.logging)
    environment(config)  # before the flags: their parser imports vLLM
    return serve(with_overrides(config, given.host, given.port, engine_flags(rest)))


def _doctor(path: Path) -> int:
    from server.loading import environment
    from server.settings.file import load

    config = load(path)
    environment(config)
    from server.checks.doctor import diagnose

    found = diagnose(config)
    if found.streams:
        print(found.table())
    for problem in found.problems:
        print(f"✗ {problem}")
    print("no problems found" if not found.problems else f"{len(found.problems)} problems")
    return 1 if found.problems else 0


if __name__ == "__main__":
    main()
