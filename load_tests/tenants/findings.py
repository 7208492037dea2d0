"""What was looked at, what was found, and the table of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BEGIN, END = "<!-- written by `python -m load_tests.tenants`: begin -->", "<!-- end -->"


@dataclass(frozen=True)
class Finding:
    """One thing that one tenant tried.

    Args:
        what: what was tried.
        shown: what was measured or counted.
        leak: what it tells of the other tenant, or why it could not be tried; '' where all is well.
    """

    what: str
    shown: str
    leak: str = ""


def table(findings: Sequence[Finding]) -> str:
    """As a Markdown table."""
    rows = [("tried", "found", "tells of the other"), ("---",) * 3]
    rows += [
        (one.what, one.shown, f"**{one.leak}**" if one.leak else "nothing") for one in findings
    ]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def into(page: str, findings: Sequence[Finding], machine: str) -> str:
    """The page with the table of one run between its two marks."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{table(findings)}\n\n{machine}\n{END}{rest.split(END)[1]}"
