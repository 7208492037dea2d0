"""The clients' own virtual environment, made when it is missing or out of date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv" / "clients"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def python(folder: Path = FOLDER) -> Path:
    """The environment's interpreter; the environment is made first if need be.

    Raises:
        subprocess.CalledProcessError: venv or pip failed.
    """
    program, mark = folder / "bin" / "python", folder / "installed.txt"
    wanted = REQUIREMENTS.read_text()
    if not mark.exists() or mark.read_text() != wanted:
        if not program.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(program), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)]
        subprocess.run(install, check=True)
        mark.write_text(wanted)
    return program
