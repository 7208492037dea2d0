"""What each check came to, and the table of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

BEGIN, END = "<!-- written by `make clients`: begin -->", "<!-- end -->"
_LONGEST = 300
"""Characters of a reason in a table."""


@dataclass(frozen=True)
class Outcome:
    """One check of one client.

    Args:
        client: its name.
        version: of its distribution.
        what: what was done with it.
        reason: why it is not as expected; '' where it is.
        seconds: how long it took.
    """

    client: str
    version: str
    what: str
    reason: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether it is as expected."""
        return not self.reason

    def line(self) -> str:
        """As the checks of a client write it to their standard output."""
        return json.dumps(asdict(self))


def read(line: str) -> Outcome:
    """The reverse of `Outcome.line`."""
    return Outcome(**json.loads(line))


def shown(outcome: Outcome) -> str:
    """One line for a terminal."""
    result = "ok" if outcome.good else f"FAILED: {_short(outcome.reason)}"
    who = f"{outcome.client} {outcome.version}"
    return f"{who:<26} {outcome.what:<66} {outcome.seconds:5.1f} s  {result}"


def table(outcomes: Sequence[Outcome]) -> str:
    """All outcomes as a Markdown table, with a sentence that counts them."""
    failed = sum(not one.good for one in outcomes)
    clients = list(dict.fromkeys(one.client for one in outcomes))
    rows = [("client", "version", "what", "result"), ("---",) * 4]
    for one in outcomes:
        result = "ok" if one.good else f"**failed**: {_short(one.reason)}"
        rows.append((one.client, one.version, one.what, result))
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    count = f"{len(clients)} clients, {len(outcomes)} checks, {failed} failed."
    return "\n".join([count, "", *lines])


def into(page: str, outcomes: Sequence[Outcome], machine: str) -> str:
    """The page with the table of one run between its two marks.

    Args:
        page: as it was.
        outcomes: of the run.
        machine: one sentence on where it ran.
    """
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{table(outcomes)}\n\n{machine}\n{END}{rest.split(END)[1]}"


def all_good(outcomes: Iterable[Outcome]) -> bool:
    """Whether there are outcomes and none failed."""
    found = list(outcomes)
    return bool(found) and all(one.good for one in found)


def _short(reason: str) -> str:
    text = " ".join(reason.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
