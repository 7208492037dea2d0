"""`coxswain adapters`: the adapters of a running server, from a shell."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import DownloadColumn, TransferSpeedColumn

from server.commands.admin_client import NOTE, Failed, ask, dump, flags, named, size, talk
from server.console import TEXT, bar, facts, table

if TYPE_CHECKING:
    import httpx

POLL_S = 0.3

_EPILOG = f"""\
examples:
  coxswain adapters list
  coxswain adapters load sql ./adapters/sql        a folder under one of the server's roots
  coxswain adapters load sql hf://owner/sql-lora@main --version 2 --replace
  coxswain adapters pin sql
  coxswain adapters unload sql
  coxswain adapters list --json                    for programs

A request then says {{"model": "sql"}}, or {{"adapters": [{{"name": "sql", "weight": 0.5}}]}}.
{NOTE}
"""


def add(commands: Any) -> None:
    """Adds the command to the command line's grammar.

    Args:
        commands: argparse's sub-parsers.
    """
    raw = argparse.RawDescriptionHelpFormatter
    top = commands.add_parser("adapters", help="list, load and unload adapters of a server",
                              epilog=_EPILOG, formatter_class=raw)  # fmt: skip
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    flags(verbs.add_parser("list", help="all adapters, as a table"))
    load = flags(verbs.add_parser("load", help="load one, and wait until it is ready"))
    load.add_argument("name", metavar="NAME", help="what requests will call it")
    load.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, hf://owner/name[@revision], s3://bucket/folder or "
        "https://host/folder; or one .gguf or .safetensors file of vectors",
    )
    load.add_argument("--version", default="1", help="a label: requests may say NAME@VERSION")
    load.add_argument("--stream", default="base", help="the stream that it changes")
    load.add_argument("--pin", action="store_true", help="never evict it")
    load.add_argument("--visible-to", action="append", metavar="GROUP",
                      help="a group of API keys that alone sees it; again for more")  # fmt: skip
    load.add_argument("--replace", action="store_true", help="replace what has this name")
    load.add_argument("--no-wait", action="store_true", help="do not wait until it is ready")
    others = {"show": "everything about one", "unload": "unload one",
              "pin": "keep one in the engine", "unpin": "let it be evicted"}  # fmt: skip
    for verb, text in others.items():
        flags(verbs.add_parser(verb, help=text)).add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    """Runs one verb.

    Returns:
        The exit status.
    """
    return talk(args, lambda client: _run(args, client))


def _run(args: argparse.Namespace, client: httpx.Client) -> int:
    if args.verb == "list":
        listing = ask(client, "GET", "adapters")
        dump(listing) if args.json else _list(listing)
        return 0
    if args.verb == "load":
        record = _load(args, client)
        text = _progress(record)
    else:
        path = named("adapters", args.name)
        calls = {"show": ("GET", path), "unload": ("DELETE", path),
                 "pin": ("POST", f"{path}/pin"), "unpin": ("POST", f"{path}/unpin")}  # fmt: skip
        record = ask(client, *calls[args.verb])
        text = {
            "show": facts(record),
            "unload": f"{args.name} is unloading: new requests no longer find it",
        }.get(args.verb, f"{args.name} is {'pinned' if record['pinned'] else 'not pinned'}")
    dump(record) if args.json else print(text)
    if args.verb == "load":
        _warn(record)
    return 0


def _warn(record: dict[str, Any]) -> None:
    for text in record["warnings"]:
        print(f"{record['name']}: warning: {text}", file=sys.stderr)


def _load(args: argparse.Namespace, client: httpx.Client) -> dict[str, Any]:
    source = args.source
    if source.startswith((".", "~")) or Path(source).is_dir():
        source = str(Path(source).expanduser().resolve())
    body = {"name": args.name, "source": source, "version": args.version,
            "stream": args.stream, "pin": args.pin, "replace": args.replace,
            "visible_to": args.visible_to}  # fmt: skip
    record: dict[str, Any] = ask(client, "POST", "adapters", json=body)
    with _Watched() as watched:
        while not args.no_wait and record["state"] not in ("ready", "failed"):
            watched.see(record)
            time.sleep(POLL_S)
            record = ask(client, "GET", named("adapters", args.name))
    if record["state"] == "failed":
        raise Failed(f"{args.name}: {record['reason']}{_hint(record)}")
    return record


class _Watched:
    """Tells on standard error how far a load is: a bar on a terminal, elsewhere a line for each
    change.
    """

    def __init__(self) -> None:
        self._said = ""
        self._bar = bar(TEXT, DownloadColumn(binary_units=True), TransferSpeedColumn())
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _Watched:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def see(self, record: dict[str, Any]) -> None:
        """What is known now."""
        text = _progress(record)
        self._bar.update(self._task, description=f"{record['name']}: {record['state']}",
                         completed=record["progress_bytes"])  # fmt: skip
        if self._bar.disable and text != self._said:
            print(text, file=sys.stderr)
        self._said = text


def _hint(record: dict[str, Any]) -> str:
    """What to do about a failure that is not the adapter's."""
    passes = record["fault"] in ("server", "source")
    return f" (the {record['fault']}'s fault, not the adapter's: try again)" if passes else ""


def _progress(record: dict[str, Any]) -> str:
    text = f"{record['name']}@{record['version']}: {record['state']}"
    if record["state"] == "downloading" and record["progress_bytes"]:
        text += f", {size(record['progress_bytes'])}"
    elif record["state"] == "ready":
        text += f" ({record['kind']}, {size(record['size_bytes'])}, {record['digest'][:12]}…)"
    return text


def _list(listing: dict[str, Any]) -> None:
    rows = [("adapter", "version", "kind", "stream", "state", "size", "in the engine", "source")]
    for record in listing["adapters"]:
        here = "pinned" if record["pinned"] else "yes" if record["here"]["resident"] else "no"
        rows.append((
            record["name"], record["version"], record["kind"] or "", record["stream"],
            record["state"], size(record["size_bytes"]), here, record["source"],
        ))  # fmt: skip
    print(table(rows))
    for record in listing["adapters"]:
        if why := record["reason"] or record["here"]["failure"]:
            print(f"{record['name']}: {why}{_hint(record)}")
        _warn(record)
    engine = listing["engine"]
    print(f"{engine['taken']} of {engine['slots']} slots of the engine are taken, "
          f"{size(engine['bytes'])} of {size(engine['max_bytes'])}")  # fmt: skip
    if listing["registry"]["away"]:
        print(f"the registry does not answer: {listing['registry']['away']}")
