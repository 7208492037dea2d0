"""Rows of the table of recipes: what the engine cannot do."""

from __future__ import annotations

from tests.recipes.row import Recipe

ROWS = (
    Recipe(
        "Nudging, word by word",
        "2410.09300",
        "from a token where max p_base < γ on, the nudging model writes to the end of the word",
        "Not served: who writes a token inside a word depends on max p_base at an earlier one. "
        "That is no function of the text: a step would have to keep it, and lose it where a "
        "request is preempted and its prefix comes from the cache. Token by token is served; "
        "`unit: word` is refused.",
        "a small aligned model",
        "1 of each",
        "none",
        "tests/recipes/test_page.py::test_nudging_by_words_is_refused",
    ),
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
