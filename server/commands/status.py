"""`coxswain status` and `coxswain drain`: how a running server is, and its orderly end."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from server.commands.admin_client import NOTE, ask, dump, flags, talk
from server.console import TEXT, bar, facts, table

if TYPE_CHECKING:
    import httpx

POLL_S = 0.3

_STATUS = f"""\
examples:
  coxswain status
  coxswain status --json

{NOTE}
"""

_DRAIN = f"""\
examples:
  coxswain drain                           waits until the server has ended
  coxswain drain --no-wait

Requests that run finish, up to the server's `server.drain_timeout_s`; new ones get 503.
{NOTE}
"""


def add(commands: Any) -> None:
    """Adds both commands to the command line's grammar.

    Args:
        commands: argparse's sub-parsers.
    """
    raw = argparse.RawDescriptionHelpFormatter
    flags(commands.add_parser("status", help="how a running server is", epilog=_STATUS,
                              formatter_class=raw))  # fmt: skip
    drain = flags(commands.add_parser("drain", help="let a server finish what runs, and end",
                                      epilog=_DRAIN, formatter_class=raw))  # fmt: skip
    drain.add_argument("--no-wait", action="store_true", help="do not wait until it has ended")


def run(args: argparse.Namespace) -> int:
    """Runs one of the two.

    Returns:
        The exit status.
    """
    work = _status if args.command == "status" else _drain
    return talk(args, lambda client: work(args, client))


def _status(args: argparse.Namespace, client: httpx.Client) -> int:
    status = ask(client, "GET", "status")
    streams = ask(client, "GET", "streams")["streams"]
    if args.json:
        dump({**status, "streams": streams})
        return 0
    versions = {name: version for name, version in status["versions"].items() if version}
    # The table below says more of the streams.
    print(facts({**{k: v for k, v in status.items() if k != "streams"}, "versions": versions}))
    print()
    rows = [("stream", "architecture", "tokens run", "passes")]
    rows += [(stream["name"], str(stream.get("architecture", "")), str(stream["tokens"]),
              str(stream["passes"])) for stream in streams]  # fmt: skip
    print(table(rows))
    return 0


def _drain(args: argparse.Namespace, client: httpx.Client) -> int:
    answer = ask(client, "POST", "drain")
    running = int(answer["in_flight"])
    if not args.no_wait:
        _wait(client, running)
    if args.json:
        dump(answer)
    elif args.no_wait:
        print(f"draining: {running} requests run")
    else:
        print("the server has ended")
    return 0


def _wait(client: httpx.Client, running: int) -> None:
    """Waits until nothing answers; shows how many requests are still to finish."""
    import httpx

    with bar(TEXT, MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task("draining", total=running)
        while True:
            try:
                left = int(client.get("/ready").json()["in_flight"])
            except httpx.TransportError:
                return
            except (ValueError, LookupError, TypeError):
                left = running  # a proxy answers in its place
            progress.update(task, completed=running - min(left, running))
            time.sleep(POLL_S)
