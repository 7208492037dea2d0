"""`coxswain train …`: recipes for the artefacts that methods and adapters need.

Light: torch is imported only when a recipe runs.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from server.commands.training import critic, meteora, value, vector

_RECIPES = {"meteora": meteora, "value": value, "critic": critic, "vector": vector}


def add(commands: Any) -> None:
    """Adds `train` and its recipes to the command line's sub-commands."""
    train = commands.add_parser("train", help="train what methods and adapters need")
    recipes = train.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for recipe in _RECIPES.values():
        recipe.add(recipes)


def run(args: argparse.Namespace) -> int:
    """Runs `coxswain train`.

    Returns:
        The exit status: 1 where something given cannot be used; the reason is on standard error.
    """
    from adapters.errors import AdapterError

    try:
        return _RECIPES[args.recipe].run(args)
    except (AdapterError, OSError) as error:
        print(f"coxswain: {error}", file=sys.stderr)
        return 1
