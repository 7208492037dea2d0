"""Recipes of the read-out's sums, masks and selections."""

from __future__ import annotations

from tests.recipes.row import Recipe, ascii_of

TEST = "tests/recipes/test_at_once.py::test_the_recipe_is_its_formula"
NONE = "none"


def _row(
    name: str, source: str, formula: str, request: str, artefacts: str, passes: str, licence: str
) -> Recipe:
    return Recipe(
        name, source, formula, request, artefacts, passes, licence, f"{TEST}[{ascii_of(name)}]"
    )


RECIPES = (
    _row("GenARM", "2410.08193", "s_base + a log π_ARM",
         '{"method": "mix", "weights": {"base": 1, "arm": 1}}',
         "an autoregressive reward model", "1 of each", NONE),
    _row("UniR", "2505.19075", "s_base + Σ a_i s_reasoner_i",
         '{"method": "mix", "weights": {"base": 1, "reasoner": 1}}',
         "a reasoner trained in the sum", "1 of each", NONE),
    _row("PAD", "2410.04070", "(1 − w) s_base + w s_RM on the base's k most likely ids",
         '{"method": "mix", "weights": {"base": 0.2, "rm": 0.8}, "top_k": 10}',
         "a DPO-type model, with the user's principle in `prompts`", "1 of each", NONE),
    _row("MOD", "2406.18853", "Σ w_i log π_i",
         '{"method": "mix", "weights": {"base": 0, "one": 0.6, "other": 0.4}}',
         "models of one base, each tuned for an objective", "1 of each, and the base's", "MIT"),
    _row("DeRa", "2402.02992", "(1 − λ) log π_ref + λ log π_aligned",
         '{"method": "mix", "weights": {"base": -0.5, "aligned": 1.5}}',
         "the model before and after alignment", "1 of each", NONE),
    _row("RAST", "2506.15710", "s_big + λ (s_RL − s_small)",
         '{"method": "proxy_tuning", "expert": "rl", "anti_expert": "small", "strength": 1}',
         "a small model before and after RL", "1 of each", "Apache-2.0"),
    _row("ThinkLogit", "2510.09354", "s + α (s_guider − s_anti)",
         '{"method": "proxy_tuning", "expert": "guider", "anti_expert": "anti", "strength": 1}',
         "a small reasoning model and its base", "1 of each", NONE),
    _row("ThinkLogit, warm-up", "2510.09354", "α = 0 for the first 100 tokens, then 1",
         '{"method": "proxy_tuning", "expert": "guider", "anti_expert": "anti", "strength": 1, '
         '"phases": [{"first": 100, "off": true}]}',
         "a small reasoning model and its base", "1 of each", NONE),
    _row("δ-unlearning", "2404.11045", "s + α (s_offset − s_offset_ref)",
         '{"method": "proxy_tuning", "expert": "offset", "anti_expert": "ref", "strength": 1}',
         "a small model that has unlearned, and before", "1 of each", "Apache-2.0 (no code)"),
    _row("ULD", "2406.08607", "log p_base + w s_assistant, w < 0, where p_base ≥ 0.1 max p_base or "
         "among its top tenth",
         '{"method": "mix", "weights": {"base": 1, "assistant": -0.8}, "plausibility": 0.1, '
         '"top_share": 0.1}',
         "an assistant that remembers what is to be forgotten", "1 of each", "MIT"),
    _row("ROSE", "2402.11889", "s(x) − a s(x, reverse prompt)",
         '{"method": "mix", "weights": {"base": 1, "twin": -0.5}, '
         '"prompts": {"twin": {"prompt": "…"}}}',
         "a reverse system prompt", "2 of the base", NONE),
    _row("SafeDecoding", "2402.08983", "p_base + a (p_expert − p_base) on shared ids, m tokens",
         '{"method": "safe_decoding", "expert": "twin"}',
         "a LoRA tuned on refusals", "2 of the base", "MIT"),
    _row("Nudging", "2410.09300", "p_nudge where max p_base < γ, token by token",
         '{"method": "select", "second": "nudge", "gate": "confidence", "threshold": 0.3, '
         '"ends": "second"}',
         "a small aligned model", "1 of each", NONE),
    _row("Co-LLM", "2403.03870", "p_assistant where σ(defer) > η",
         '{"method": "select", "second": "assistant", "gate": "classifier", "classifier": "defer"}',
         "a checkpoint with a defer row, as `head: classifier`", "1 of each", NONE),
    _row("Co-LLM, compose", "2403.03870", "(1 − d) p_base + d p_assistant where d > η",
         '{"method": "select", "second": "assistant", "gate": "classifier", "classifier": "defer", '
         '"mode": "soft", "threshold": 0.5}',
         "a checkpoint with a defer row, as `head: classifier`", "1 of each", NONE),
    _row("ARGS", "2402.01694", "s_v + w r(x ⊕ v) on the base's k most likely ids",
         '{"method": "value_augmented", "values": [{"stream": "reward", "strength": 1.5}], '
         '"top_k": 10, "mask": true, "centre": false, "eos_value": "model"}',
         "a reward model with a scalar head", "1, and k rows of the reward model", NONE),
    _row("RAD", "2310.09520", "s_v + β clip(r(x ⊕ v), 0, 1) on the k most likely ids",
         '{"method": "value_augmented", "values": [{"stream": "reward", "strength": 10}], '
         '"top_k": 20, "mask": true, "centre": false, "transform": "clip", "eos_value": "model"}',
         "a unidirectional reward model", "1, and k rows of the reward model", NONE),
    _row("FUDGE", "2104.05218", "log p_v + λ log σ(a(x ⊕ v)) on the k most likely ids",
         '{"method": "value_augmented", "values": [{"stream": "attribute", "strength": 1}], '
         '"top_k": 64, "mask": true, "centre": false, "transform": "log_sigmoid", '
         '"eos_value": "model"}',
         "an attribute model whose head gives log-odds", "1, and k rows of it", NONE),
    _row("Memory Decoder", "2508.09874", "log((1 − λ) p_base + λ p_memory)",
         '{"method": "select", "second": "memory", "gate": "constant", "share": 0.25}',
         "a memory decoder of the base's family", "1 of each", "Apache-2.0"),
)  # fmt: skip
