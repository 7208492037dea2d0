"""Counts what the clients write down, while they write it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_FAILURES = 50
"""That are kept with what was said."""


class Tally:
    """The counts of one soak.

    Args:
        file: `requests.jsonl`; it need not be there yet.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._read = file, 0
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[dict[str, Any]] = []
        self.tokens, self.worst = 0, 0.0

    def update(self) -> None:
        """Counts the lines that are new."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._count(json.loads(line))

    def _count(self, record: dict[str, Any]) -> None:
        self.counts[record["kind"]][record["outcome"]] += 1
        self.tokens += record.get("tokens", 0)
        if record["outcome"] == "right":
            self.worst = max(self.worst, record["error"])
        if record["outcome"] in ("wrong", "failed") and len(self.failures) < MOST_FAILURES:
            self.failures.append(record)

    def total(self, *outcomes: str) -> int:
        """Requests, of all outcomes or of some."""
        return sum(
            n
            for one in self.counts.values()
            for outcome, n in one.items()
            if not outcomes or outcome in outcomes
        )

    def records(self) -> Iterator[dict[str, Any]]:
        """All lines, again."""
        if self._file.exists():
            with self._file.open() as file:
                yield from (json.loads(line) for line in file if line.endswith("\n"))
