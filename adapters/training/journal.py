"""Work that a killed run does not lose: a JSONL file that grows by one line at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.training.errors import BadRecipe


class Journal:
    """Entries of a file, in the order in which they were added.

    A last line that a kill has torn is dropped from the file.

    Args:
        file: made, with its folder, if it is missing.

    Raises:
        BadRecipe: a line is not a JSON object.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = file.read_bytes() if file.exists() else b""
        whole = found[: found.rfind(b"\n") + 1]
        self.entries: list[dict[str, Any]] = [
            _entry(file, i, line) for i, line in enumerate(whole.splitlines(), 1)
        ]
        """What the file holds."""
        self._file = file.open("ab")
        self._file.truncate(len(whole))

    def add(self, entry: dict[str, Any]) -> None:
        """Puts an entry behind the others; it is with the system when this returns."""
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.entries.append(entry)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _entry(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise BadRecipe(
            f"broken: {error}", field=f"{file}:{number}", allowed="remove the file to start again"
        ) from error
    return entry
