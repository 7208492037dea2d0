"""Makes the page of recipes from the tables: `python -m tests.recipes.page` writes it."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

from tests.docs.reference import sentence, table
from tests.recipes import table_rules, table_search, table_taps, table_vectors
from tests.recipes.row import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "recipes.md"

_MADE = (
    *table_rules.RECIPES,
    *table_taps.ROWS,
    *table_vectors.ROWS,
    *table_search.ROWS,
)
ORDER = (
    "GenARM", "UniR", "PAD", "MOD", "DeRa", "RAST", "ThinkLogit", "δ-unlearning", "ULD", "ROSE",
    "SafeDecoding", "Nudging", "Co-LLM", "Memory Decoder", "ARGS", "RAD", "FUDGE", "DoLa", "SLED",
    "CAA", "CAST", "ITI", "LoFiT", "LoReFT", "Reward-guided speculative decoding (RSD)",
    "Guided speculative inference (GSI)", "Blockwise controlled decoding", "Weak-to-strong search",
)  # fmt: skip
"""Names, or what they begin with: a paper may have several recipes."""

RECIPES: tuple[Recipe, ...] = tuple(
    row for name in ORDER for row in _MADE if row.name == name or row.name.startswith(f"{name}, ")
)
SERVED = tuple(row.name for row in RECIPES)

HEAD = """\
# Recipes

Generated from the tests' tables by `python -m tests.recipes.page`; do not edit.

Decoding methods and steering vectors that others have published, and the request that does each
here. All are cases of the [methods](methods/README.md) and of [adapters](adapters.md).
`tests/recipes` holds each to its formula: on tiny random models, against the formula written
plainly in float64, within 1e-4 nats. One test runs all of them at once, in one engine, beside plain
requests.

In the formulas, `s` is a stream's scores over the vocabulary, `p` or `π` its probabilities, x the
prompt, y the reply so far. Streams and adapters have the names that the recipe gives them; yours
are in your [configuration](../reference/configuration.md). A `steering` object may stand in a
profile as well. Passes are per token, unless the recipe says else. Where the licence is `none`, the
authors' code has no licence, or there is none; no code was copied from any of them."""


def anchor(name: str) -> str:
    """The heading's anchor, as GitHub writes it."""
    return re.sub(r"[^\w -]", "", name).lower().replace(" ", "-")


def request_of(row: Recipe) -> str:
    """The request in lines of a page's width."""
    asked = json.loads(row.request)
    body = asked if "adapters" in asked else {"steering": asked}
    text = json.dumps(body, ensure_ascii=False)
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False,
                          subsequent_indent="  ")  # fmt: skip
    return "\n".join(("```json", *lines, "```"))


def section(row: Recipe) -> str:
    """A recipe in full."""
    paper = f"[arXiv {row.source}](https://arxiv.org/abs/{row.source})"
    said = [
        f"- Paper: {paper}. Licence of the authors' code: {row.licence}.",
        f"- Artefacts: {row.artefacts}.",
        f"- Passes: {row.passes}.",
        f"- Test: `{row.test.replace('::', '` `', 1)}`",
    ]
    return "\n\n".join((f"## {row.name}", f"    {row.formula}", request_of(row), "\n".join(said)))


def page() -> str:
    """The page."""
    head = ("recipe", "what it computes", "needs", "passes", "authors' code")
    rows = [
        [
            f"[{row.name}](#{anchor(row.name)})",
            sentence(row.formula),
            sentence(row.artefacts),
            sentence(row.passes),
            row.licence,
        ]
        for row in RECIPES
    ]
    return "\n\n".join((HEAD, table(head, rows), *map(section, RECIPES))) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
