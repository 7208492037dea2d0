"""`coxswain adapters`: the adapters of a running server, from a shell. Needs httpx only."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from server.console import table

if TYPE_CHECKING:
    import httpx

URL = "http://127.0.0.1:8000"
POLL_S = 0.3

_EPILOG = """\
examples:
  coxswain adapters list
  coxswain adapters load sql ./adapters/sql        a folder under one of the server's roots
  coxswain adapters load sql hf://owner/sql-lora@main --version 2 --replace
  coxswain adapters pin sql
  coxswain adapters unload sql

A request then says {"model": "sql"}, or {"adapters": [{"name": "sql", "weight": 0.5}]}.
The key is read from COXSWAIN_ADMIN_KEY, the address from COXSWAIN_URL.
"""


def add(commands: Any) -> None:
    """Adds the command to the command line's grammar.

    Args:
        commands: argparse's sub-parsers.
    """
    raw = argparse.RawDescriptionHelpFormatter
    top = commands.add_parser("adapters", help="list, load and unload adapters of a server",
                              epilog=_EPILOG, formatter_class=raw)  # fmt: skip
    top.add_argument("--url", default=os.environ.get("COXSWAIN_URL", URL),
                     help=f"the server (default: COXSWAIN_URL, else {URL})")  # fmt: skip
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="all adapters, as a table")
    load = verbs.add_parser("load", help="load one, and wait until it is ready")
    load.add_argument("name", metavar="NAME", help="what requests will call it")
    load.add_argument("source", metavar="SOURCE",
                      help="a folder, hf://owner/name[@revision], s3://bucket/folder or "
                      "https://host/folder")  # fmt: skip
    load.add_argument("--version", default="1", help="a label: requests may say NAME@VERSION")
    load.add_argument("--stream", default="base", help="the stream that it changes")
    load.add_argument("--pin", action="store_true", help="never evict it")
    load.add_argument("--replace", action="store_true", help="replace what has this name")
    load.add_argument("--no-wait", action="store_true", help="do not wait until it is ready")
    others = {"show": "everything about one", "unload": "unload one",
              "pin": "keep one in the engine", "unpin": "let it be evicted"}  # fmt: skip
    for verb, text in others.items():
        verbs.add_parser(verb, help=text).add_argument("name", metavar="NAME")


def run(given: argparse.Namespace) -> int:
    """Runs one verb.

    Returns:
        The exit status.
    """
    import httpx

    key = os.environ.get("COXSWAIN_ADMIN_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=given.url, headers=headers, timeout=60) as client:
            return _run(given, client)
    except httpx.HTTPError as error:
        print(f"coxswain: {given.url}: {error}", file=sys.stderr)
    except _Refused as error:
        print(f"coxswain: {error}", file=sys.stderr)
    return 1


class _Refused(Exception):
    """The server's error message."""


def _run(given: argparse.Namespace, client: httpx.Client) -> int:
    if given.verb == "list":
        _list(_ask(client, "GET", ""))
        return 0
    if given.verb == "load":
        return _load(given, client)
    one = f"/{quote(given.name, safe='')}"
    if given.verb == "show":
        _show(_ask(client, "GET", one))
    elif given.verb == "unload":
        _ask(client, "DELETE", one)
        print(f"{given.name} is unloading: new requests no longer find it")
    else:
        record = _ask(client, "POST", f"{one}/{given.verb}")
        print(f"{given.name} is {'pinned' if record['pinned'] else 'not pinned'}")
    return 0


def _ask(client: httpx.Client, verb: str, path: str, **options: Any) -> Any:
    answer = client.request(verb, f"/admin/adapters{path}", **options)
    try:
        found = answer.json()
        if answer.is_success:
            return found
        raise _Refused(f"{answer.status_code}: {found['error']['message']}")
    except (ValueError, LookupError, TypeError):
        raise _Refused(f"{answer.status_code}: not an answer of Coxswain") from None


def _load(given: argparse.Namespace, client: httpx.Client) -> int:
    source = given.source
    if source.startswith((".", "~")) or Path(source).is_dir():
        source = str(Path(source).expanduser().resolve())
    body = {"name": given.name, "source": source, "version": given.version,
            "stream": given.stream, "pin": given.pin, "replace": given.replace}  # fmt: skip
    record = _ask(client, "POST", "", json=body)
    said = ""
    while not given.no_wait and record["state"] not in ("ready", "failed"):
        if (text := _progress(record)) != said:
            print(said := text, file=sys.stderr)
        time.sleep(POLL_S)
        record = _ask(client, "GET", f"/{quote(given.name, safe='')}")
    if record["state"] == "failed":
        raise _Refused(f"{given.name}: {record['reason']}")
    print(_progress(record))
    return 0


def _progress(record: dict[str, Any]) -> str:
    text = f"{record['name']}@{record['version']}: {record['state']}"
    if record["state"] == "downloading" and record["progress_bytes"]:
        text += f", {_size(record['progress_bytes'])}"
    elif record["state"] == "ready":
        text += f" ({record['kind']}, {_size(record['size_bytes'])}, {record['digest'][:12]}…)"
    return text


def _list(found: dict[str, Any]) -> None:
    rows = [("adapter", "version", "kind", "stream", "state", "size", "in the engine", "source")]
    for record in found["adapters"]:
        here = "pinned" if record["pinned"] else "yes" if record["here"]["resident"] else "no"
        rows.append((
            record["name"], record["version"], record["kind"] or "", record["stream"],
            record["state"], _size(record["size_bytes"]), here, record["source"],
        ))  # fmt: skip
    print(table(rows))
    for record in found["adapters"]:
        if why := record["reason"] or record["here"]["failure"]:
            print(f"{record['name']}: {why}")
    engine = found["engine"]
    print(f"{engine['taken']} of {engine['places']} places in the engine are taken, "
          f"{_size(engine['bytes'])} of {_size(engine['max_bytes'])}")  # fmt: skip
    if found["registry"]["away"]:
        print(f"the registry does not answer: {found['registry']['away']}")


def _show(record: dict[str, Any]) -> None:
    width = max(map(len, record))
    for name, value in record.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        print(f"{name:<{width}}  {'' if value is None else value}")


def _size(count: float | None) -> str:
    if count is None:
        return ""
    units = ("B", "KiB", "MiB", "GiB")
    step = 0
    while count >= 1024 and step < len(units) - 1:
        count, step = count / 1024, step + 1
    return f"{count:.4g} {units[step]}"
