"""A row of the table of recipes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A paper's method as this server does it.

    Args:
        name: what the field calls it.
        source: the paper, as arXiv's number.
        formula: what it computes.
        request: the `steering` object, or the profile, as JSON or YAML.
        artefacts: what files it needs.
        passes: its cost in forward passes.
        licence: of the authors' code.
        test: the test that holds it to its formula, as pytest's id.
    """

    name: str
    source: str
    formula: str
    request: str
    artefacts: str
    passes: str
    licence: str
    test: str


def ascii_of(name: str) -> str:
    """A recipe's name as pytest's ids have it."""
    return name.replace("δ", "delta")
