"""A wall clock that a test sets, for processes that it starts."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path


class Clock:
    """Compiles `clock.c`, which tells how.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._offset, library = folder / "offset", folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"],
            check=True,
        )
        self.set(0)
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._offset)}
        """For processes that shall have this clock."""

    def set(self, offset_s: int) -> None:
        """Makes it go wrong by so many seconds, at once."""
        mode = "r+b" if self._offset.exists() else "wb"
        with self._offset.open(mode) as file:
            file.write(struct.pack("q", offset_s))
