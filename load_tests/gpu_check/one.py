"""The process of one section: its letter, its seconds, and where the outcome goes."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from load_tests.gpu_check.sections import SECTIONS, here


def main() -> None:
    """Runs the section that the command line names."""
    letter, seconds, out = sys.argv[1:]
    section = next(section for section in SECTIONS if section.letter == letter)
    outcome = here(section, float(seconds))
    part = Path(out + ".part")
    part.write_text(json.dumps(asdict(outcome)))
    part.rename(out)
    sys.stdout.flush()
    os._exit(0)  # an engine's shutdown is slow, and nothing is left to save


if __name__ == "__main__":
    main()
