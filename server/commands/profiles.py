"""`coxswain profiles`: the profiles of a configuration file or of a running server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from server.commands.admin_client import NOTE, Failed, ask, dump, flags, named, talk
from server.console import facts, table

if TYPE_CHECKING:
    import httpx

_EPILOG = f"""\
examples:
  coxswain profiles list                   of the running server
  coxswain profiles list zoo.yaml          of a configuration file, without a server
  coxswain profiles put mild '{{"method": "proxy_tuning", "expert": "chat",
                               "anti_expert": "plain", "strength": 0.5}}'
  coxswain profiles put mild @mild.json    from a file; @- from standard input
  coxswain profiles show mild
  coxswain profiles delete mild

What is put is kept until the server ends; the configuration's own profiles cannot be replaced.
{NOTE}
"""


def add(commands: Any) -> None:
    """Adds the command to the command line's grammar.

    Args:
        commands: argparse's sub-parsers.
    """
    raw = argparse.RawDescriptionHelpFormatter
    top = commands.add_parser("profiles", help="list, put and delete profiles",
                              epilog=_EPILOG, formatter_class=raw)  # fmt: skip
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = flags(verbs.add_parser("list", help="all profiles, as a table"))
    listing.add_argument("config", metavar="CONFIG", type=Path, nargs="?",
                         help="a YAML file (default: the running server)")  # fmt: skip
    show = flags(verbs.add_parser("show", help="everything about one"))
    put = flags(verbs.add_parser("put", help="add or replace one, until the server ends"))
    delete = flags(verbs.add_parser("delete", help="forget one that was put"))
    for subparser in (show, put, delete):
        subparser.add_argument("name", metavar="NAME", help="what requests call it")
    put.add_argument("spec", metavar="JSON", help="the profile, or @FILE, or @- to read it")


def run(args: argparse.Namespace) -> int:
    """Runs one verb.

    Returns:
        The exit status.
    """
    if args.verb == "list" and args.config is not None:
        from server.settings.file import load

        profiles = load(args.config).profiles
        by_name = {
            name: profile.model_dump(exclude_none=True, exclude_defaults=True)
            for name, profile in profiles.items()
        }
        _list([{"name": n, "origin": "config", **fields} for n, fields in by_name.items()], args)
        return 0
    return talk(args, lambda client: _run(args, client))


def _run(args: argparse.Namespace, client: httpx.Client) -> int:
    if args.verb == "list":
        _list(ask(client, "GET", "profiles")["profiles"], args)
        return 0
    path = named("profiles", args.name)
    if args.verb == "show":
        record = ask(client, "GET", path)
        dump(record) if args.json else print(facts(record))
    elif args.verb == "put":
        record = ask(client, "PUT", path, json=_spec(args.spec))
        dump(record) if args.json else print(f"{args.name}: {record['method']}")
    else:
        ask(client, "DELETE", path)
        dump({"name": args.name, "deleted": True}) if args.json else print(
            f"{args.name} is gone; requests that use it now finish"
        )
    return 0


def _spec(text: str) -> object:
    """The profile that was written, or that is in a file.

    Raises:
        Failed: it cannot be read, or is not JSON.
    """
    try:
        if text == "@-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        spec: object = json.loads(text)
    except OSError as error:
        raise Failed(f"{text[1:]}: {error.strerror}") from error
    except ValueError as error:
        raise Failed(f"the profile is not JSON: {error}") from error
    return spec


def _list(profiles: list[dict[str, Any]], args: argparse.Namespace) -> None:
    if args.json:
        dump({"profiles": profiles})
        return
    rows = [("profile", "origin", "method", "options")]
    for record in profiles:
        # A template has many lines, a table one for each profile.
        options = ", ".join(f"{key}={shorten(str(value), 60)}" for key, value in record.items()
                            if key not in ("name", "origin", "method"))  # fmt: skip
        rows.append((record["name"], record["origin"], record["method"], options))
    print(table(rows))
