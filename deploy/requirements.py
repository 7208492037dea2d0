"""What the images install before they know our source. Needs nothing but Python.

`requirements.py [EXTRA]...`: the dependencies in pyproject.toml, one a line.
`requirements.py --constraints HAS PINS`: what is installed stays, of the rest the pins hold.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(project: Path, extras: list[str]) -> list[str]:
    """The dependencies of a project and of some of its extras.

    Raises:
        KeyError: there is no such extra.
    """
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    found: list[str] = list(table["dependencies"])
    for extra in extras:
        found += table["optional-dependencies"][extra]
    return found


def name(pin: str) -> str:
    """A package's name in its one normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>!~;\[ @]", pin.strip(), maxsplit=1)[0]).lower()


def constraints(has: list[str], pins: list[str]) -> list[str]:
    """Exact versions of what is installed, as `pip freeze` names it, and pins of what is not."""
    there = [line for line in has if re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line)]
    named = {name(line) for line in has}
    return there + [p for p in pins if p and not p.startswith("#") and name(p) not in named]


def main(arguments: list[str]) -> None:
    """Prints them."""
    if arguments[:1] == ["--constraints"]:
        has, pins = (Path(file).read_text(encoding="utf-8").splitlines() for file in arguments[1:])
        print(*constraints(has, pins), sep="\n")
    else:
        print(*requirements(Path("pyproject.toml"), arguments), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
