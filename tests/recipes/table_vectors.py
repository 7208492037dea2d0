"""Rows of the table of recipes: what changes hidden states."""

from __future__ import annotations

from tests.recipes.row import Recipe

_TEST = "tests/recipes/test_at_once.py::test_the_recipe_is_its_formula"

ROWS = (
    Recipe(
        "CAA", "2312.06681", "h_{l+1} + m · v at the positions behind the instruction",
        '{"adapters": [{"name": "caa", "weight": -1.5, "where": {"prompt_last": 4, "from": 0}}]}',
        "a vector [H] for one layer; the client counts the tokens behind [/INST]",
        "1", "MIT", f"{_TEST}[CAA]",
    ),
    Recipe(
        "CAST", "2409.05907",
        "h_l + strength · v_l in the reply, if cos(u, tanh((c cᵀ / c·c) u)) > θ, u the mean of the "
        "prompt's h_c",
        '{"adapters": [{"name": "guard", "weight": 1.5}]}',
        "behaviour vectors, a condition's vector c, its layer and threshold, in one file of kind "
        "`conditional`; the prompt's own positions are not steered "
        "(`apply_behavior_on_first_call=False`)",
        "1", "Apache-2.0", f"{_TEST}[CAST]",
    ),
    Recipe(
        "ITI", "2306.03341", "x_head + α σ θ before o_proj, from the last prompt token on",
        '{"adapters": [{"name": "iti"}]}',
        "activations of heads and their labels, or directions: `coxswain convert-vectors`",
        "1", "MIT", f"{_TEST}[ITI]",
    ),
    Recipe(
        "LoFiT", "2406.01563", "(1 + A) ⊙ x_head + v at the input of o_proj",
        '{"adapters": [{"name": "lofit"}]}',
        "the authors' checkpoint: `coxswain convert-vectors`; A alike where heads share a value",
        "1", "MIT", f"{_TEST}[LoFiT]",
    ),
    Recipe(
        "LoReFT", "2404.03592", "h + Rᵀ (W h + b − R h) at the first 7 and last 7 prompt tokens",
        '{"adapters": [{"name": "reft"}]}',
        "R, W and b of each layer; the positions stand in the adapter's file", "1", "Apache-2.0",
        f"{_TEST}[LoReFT]",
    ),
)  # fmt: skip
