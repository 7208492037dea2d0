"""Shared by the commands for a running server: its address, its key, its errors.

Needs httpx only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    import httpx

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0
NOTE = "The key is read from COXSWAIN_ADMIN_KEY, the address from COXSWAIN_URL."


class Refused(Exception):
    """The server's error message.

    Args:
        status: the HTTP status.
        message: what it said.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(f"{status}: {message}")


class Failed(Exception):
    """An accepted operation failed later; the message is for a person."""


def flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--url` and `--json`, which all these commands have."""
    parser.add_argument("--url", default=os.environ.get("COXSWAIN_URL", URL),
                        help=f"the server (default: COXSWAIN_URL, else {URL})")  # fmt: skip
    parser.add_argument("--json", action="store_true",
                        help="print the server's answer as JSON, for programs")  # fmt: skip
    return parser


def talk(args: argparse.Namespace, work: Callable[[httpx.Client], int]) -> int:
    """Runs `work` with a client of the server that the flags name; what fails becomes one line.

    Returns:
        The exit status.
    """
    import httpx

    key = os.environ.get("COXSWAIN_ADMIN_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=args.url, headers=headers, timeout=TIMEOUT_S) as client:
            return work(client)
    except httpx.InvalidURL as error:
        print(f"coxswain: --url {args.url}: {error}", file=sys.stderr)
    except httpx.HTTPError as error:
        print(f"coxswain: {args.url}: {error}", file=sys.stderr)
    except (Refused, Failed) as error:
        print(f"coxswain: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def ask(client: httpx.Client, verb: str, path: str, **options: Any) -> Any:
    """One call of the admin API; None where the answer is empty.

    Raises:
        Refused: the server's error, or something answered that is not Coxswain.
    """
    answer = client.request(verb, f"/admin/{path}", **options)
    if answer.status_code == 204:
        return None
    try:
        body = answer.json()
        if answer.is_success:
            return body
        message = body["error"]["message"]
    except (ValueError, LookupError, TypeError):
        raise Refused(answer.status_code, "not an answer of Coxswain") from None
    raise Refused(answer.status_code, message)


def named(kind: str, name: str) -> str:
    """The path of one adapter or profile."""
    return f"{kind}/{quote(name, safe='')}"


def dump(value: object) -> None:
    """Prints JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def size(count: float | None) -> str:
    """Bytes for people; nothing for None."""
    if count is None:
        return ""
    units = ("B", "KiB", "MiB", "GiB")
    step = 0
    while count >= 1024 and step < len(units) - 1:
        count, step = count / 1024, step + 1
    return f"{count:.4g} {units[step]}"
