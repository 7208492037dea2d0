"""Rows of the table of recipes: searches."""

from __future__ import annotations

from tests.recipes.row import Recipe

_TESTS = "tests/recipes/test_search.py::"

ROWS = (
    Recipe(
        "Blockwise controlled decoding",
        "2310.17022",
        "y ← y ⊕ argmax_b V(x ⊕ y ⊕ b) over K blocks of M tokens from the base, until the end",
        '{"method": "guided_search", "k": 4, "block": {"tokens": 32}, "score": {"value": "value"}}',
        "a value model, or a classifier, as a stream",
        "base: K for each token; value: one prefill of each block",
        "no release",
        _TESTS + "test_blockwise_best_of_k",
    ),
    Recipe(
        "Weak-to-strong search",
        "2405.19262",
        "W beams × K successors of L tokens; keep the W of largest "
        "Σ_t log π_tuned(y_t) − log π_untuned(y_t); the best of the last",
        '{"method": "guided_search", "k": 2, "beams": 2, "block": {"tokens": 30}, '
        '"score": {"log_ratio": {"of": "tuned", "to": "untuned"}}}',
        "a small tuned model and the one before it was tuned, of the base's vocabulary",
        "base, tuned and untuned: W·K for each token",
        "none",
        _TESTS + "test_chunk_level_beam_search",
    ),
    Recipe(
        "Reward-guided speculative decoding (RSD)",
        "2501.19324",
        "a step of the small model if σ(r(x ⊕ y ⊕ step)) ≥ δ, else a step of the base, unscored",
        '{"method": "guided_search", "draw": "small", "k": 1, '
        '"block": {"tokens": 512, "until": "\\n\\n"}, '
        '"score": {"value": "reward", "scale": "probability"}, "accept": {"at_least": 0.7}, '
        '"fallback": {"draw": "base", "k": 1}}',
        "a small model of the base's vocabulary; a process reward model as a classifier",
        "small: 1 for each token; base: 1 for each token of rejected steps, and a prefill of what "
        "was accepted since; reward: one prefill of each step",
        "Apache-2.0",
        _TESTS + "test_reward_guided_speculation",
    ),
    Recipe(
        "Guided speculative inference (GSI)",
        "2506.04118",
        "of n steps of the small model i ∝ exp(β r_i + log π_B(y_i) − log π_S(y_i)), accepted if "
        "that is ≥ u; else of n steps of the base i ∝ exp(β r_i)",
        '{"method": "guided_search", "draw": "small", "k": 4, "choose": "sample", '
        '"block": {"tokens": 512, "until": "\\n\\n"}, '
        '"score": {"value": "reward", "scale": "probability", "weight": 20, '
        '"log_ratio": {"of": "base", "to": "small"}}, "accept": {"at_least": 10}, '
        '"fallback": {"draw": "base", "k": 4, '
        '"score": {"value": "reward", "scale": "probability", "weight": 20}}}',
        "a small model of the base's vocabulary; a process reward model as a classifier",
        "small and base: n for each token; base: n for each token of rejected steps; reward: one "
        "prefill of each step",
        "Apache-2.0",
        _TESTS + "test_guided_speculative_inference",
    ),
)
