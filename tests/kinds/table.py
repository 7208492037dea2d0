"""What became of each kind of adapter, as the tests found it, and the page that shows it
(docs/reference/adapter-kinds.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version

from tests.adapters.kinds import REFUSED, SERVED, Case

KINDS = tuple(dict.fromkeys(case.kind for case in (*SERVED, *REFUSED)))
"""Every kind that is tried; in the page's order."""

TOLERANCE = 1e-4
"""Nats, float32."""


@dataclass
class Row:
    """The facts of one kind.

    Args:
        case: the first of its adapters.
        bases: those that were tried.
        error: the largest error of a log-probability, nats; None: refused.
        sentences: by which it was refused, by base.
    """

    case: Case
    bases: list[str] = field(default_factory=list)
    error: float | None = None
    sentences: dict[str, str] = field(default_factory=dict)

    def served(self, case: Case, error: float) -> None:
        """Notes an adapter that was served."""
        self.bases.append(case.base)
        self.error = max(self.error or 0.0, error)

    def refused(self, case: Case, sentence: str) -> None:
        """Notes an adapter that was refused."""
        self.bases.append(case.base)
        self.sentences[case.base] = sentence

    def cells(self) -> list[str]:
        """As the page shows them."""
        assert (self.error is None) == bool(self.sentences), f"{self.case.kind}: both, or neither"
        # In the order of the cases, whatever the order of the tests.
        order = [case.base for case in (*SERVED, *REFUSED) if case.kind == self.case.kind]
        bases = sorted(self.bases, key=order.index)
        if self.error is None:
            here = f"refused: {self.sentences[bases[0]]}"
        else:
            here = f"exact: {self.error:.0e}"
        cells = [self.case.kind, f"`{self.case.described}`", ", ".join(bases), here]
        return [cell.replace("|", "\\|") for cell in cells]


BEGIN, END = "<!-- written by `make kinds`: begin -->", "<!-- end -->"


def into(page: str, rows: Iterable[Row]) -> str:
    """The page with the facts of one run between its two marks."""
    found = {row.case.kind: row for row in rows}
    heads = ("kind", "PEFT's config", "tried on", "here")
    table = [heads, ("---",) * len(heads), *(found[k].cells() for k in KINDS if k in found)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    lines += ["", f"peft {version('peft')}, transformers {version('transformers')}."]
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"
