"""Rows of the table of recipes: what the engine cannot do."""

from __future__ import annotations

from tests.recipes.row import Recipe

ROWS = (
    Recipe(
        "CAST",
        "2409.05907",
        "h_l + strength · v_l if cos(u, tanh(proj_c u)) passes θ, u the mean of h over the prompt",
        "Not served: the gate is known only once layer c has read the whole prompt, but the paper "
        "steers the prompt's own tokens too, in layers and chunks that have run by then. The "
        "vectors alone are served, without the condition; a file of another kind is refused.",
        "behaviour vectors, a condition vector, a layer and a threshold",
        "1, and one of the prompt before",
        "Apache-2.0",
        "tests/recipes/test_page.py::test_conditional_vectors_are_refused",
    ),
)
