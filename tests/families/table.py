"""What each family gave, as its tests measured it, and the page that shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

BEGIN, END = "<!-- written by `make families`: begin -->", "<!-- end -->"

ROLES = ("base", "twin", "companion", "adapters", "taps")


@dataclass
class Row:
    """The facts of one family.

    Args:
        errors: role → the largest error of a log-probability, nats.
        refused: the sentence with which it is refused; '' where it is served.
    """

    errors: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    def state(self) -> str:
        """`exact` or `refused`."""
        return "refused" if self.refused else "exact"

    def cells(self, name: str) -> list[str]:
        """As the page shows them."""
        if self.refused:
            return [name, f"refused: {self.refused}", *[""] * len(ROLES)]
        return [name, "exact", *(_shown(self.errors.get(role)) for role in ROLES)]

    def note(self, role: str, error: float) -> None:
        """Adds an error of one role; the largest counts."""
        self.errors[role] = max(error, self.errors.get(role, 0.0))


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}" if error else "0"


def into(page: str, rows: dict[str, Row]) -> str:
    """The page with the facts of one run between its two marks."""
    heads = ("family", "state", "as base", "as twin", "as companion", "with adapters", "taps")
    table = [heads, ("---",) * len(heads), *(row.cells(name) for name, row in rows.items())]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}"


def states(page: str) -> dict[str, str]:
    """Family → `exact` or `refused`, as a page says."""
    found = {}
    for line in page.split(BEGIN)[1].split(END)[0].splitlines()[3:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        found[cells[0]] = cells[1].split(":")[0]
    return found
