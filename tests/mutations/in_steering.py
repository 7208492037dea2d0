"""Faults in `steering/`."""

from tests.mutations.fault import Fault

KERNELS = "tests/steering/kernels/test_mix.py"
METHODS = "tests/steering/test_methods.py"
RESOLVE = "tests/steering/test_resolve.py"
STATES = "tests/steering/worker/test_request_state.py"

FAULTS = (
    # --- steering: the read-out sum --------------------------------------------------------------
    Fault(
        "steering/kernels/mix.py",
        "            term.masked_fill_(c == 0, 0.0)",
        "            term.masked_fill_(c != c, 0.0)",
        KERNELS,
        "a stream that a row does not use spoils it where its scores are not finite",
    ),
    Fault(
        "steering/kernels/mix.py",
        "inside = (before < p[:, None])",
        "inside = (before <= p[:, None])",
        KERNELS,
        "one id too many in the nucleus",
    ),
    Fault(
        "steering/kernels/mix.py",
        "return torch.where(s < floor, z - back, z)",
        "return torch.where(s <= floor, z - back, z)",
        KERNELS,
        "with plausibility 1 the best id is set back, too",
    ),
    Fault(
        "steering/kernels/mix.py",
        "log_rest = torch.where(head, log(-odds), rest)",
        "log_rest = torch.where(head, log(odds), rest)",
        KERNELS,
        "the soft mode trusts the wrong model",
    ),
    Fault(
        "steering/kernels/mix.py",
        "    back = (coef[:, :1] <= 0) * SET_BACK\n",
        "    back = 0.0\n",
        KERNELS,
        "ids that a stream lacks are drawn where the base has no weight",
    ),
    Fault(
        "steering/kernels/mix.py",
        "gap = torch.where(probability > 0, steered - (base - base_mass[:, None]), 0.0)",
        "gap = torch.where(probability > 0, steered - base, 0.0)",
        KERNELS,
        "reports show a divergence that is off by the base's normaliser",
    ),
    Fault(
        "steering/methods/contrastive.py",
        "Recipe({BASE: 1.0 + a, config.amateur: -a}, rule)",
        "Recipe({BASE: 1.0 - a, config.amateur: a}, rule)",
        METHODS,
        "contrastive decoding prefers what the amateur prefers",
    ),
    Fault(
        "steering/methods/contrastive.py",
        "        if a == 0:\n            return Recipe({BASE: 1.0})\n",
        "",
        METHODS + " " + RESOLVE,
        "strength 0 still cuts the base to plausible ids",
    ),
    Fault(
        "steering/methods/guidance.py",
        "config.negative: 1.0 - config.strength",
        "config.negative: config.strength - 1.0",
        METHODS,
        "guidance moves towards the negative prompt",
    ),
    Fault(
        "steering/methods/context_aware.py",
        "Recipe({BASE: 1.0 + a, config.without: -a})",
        "Recipe({BASE: 1.0, config.without: -a})",
        METHODS,
        "the context counts less, not more",
    ),
    Fault(
        "steering/methods/proxy_tuning.py",
        "(config.anti_expert, -config.strength)",
        "(config.anti_expert, config.strength)",
        METHODS,
        "the anti-expert is added",
    ),
    Fault(
        "steering/vocabulary.py",
        "d.stream is not None and d.id not in base.special",
        "d.stream is None and d.id not in base.special",
        "tests/steering/test_vocabulary.py",
        "models with other tokenizers are mixed id by id",
    ),
    Fault(
        "steering/vocabulary.py",
        "np.where(itself, ids, np.int32(self.stand_in))",
        "ids",
        "tests/steering/test_vocabulary.py",
        "a stream reads ids that it lacks",
    ),
    Fault(
        "steering/prompts.py",
        "[base_ids[0]] * pad",
        "[base_ids[-1]] * pad",
        "tests/steering/test_prompts.py",
        "padding changes which tokens penalties see",
    ),
    Fault(
        "steering/bans.py",
        "BANNED if b <= BAN",
        "BANNED if b < BAN",
        "tests/engine/test_constraints.py tests/steering",
        "a banned id is drawn under `contrastive`",
    ),
    Fault(
        "steering/wire.py",
        "found = [min(lengths)] if min(lengths) < prompt_len else []",
        "found = []",
        "tests/steering tests/engine/test_exactness.py",
        "prefix caches share blocks that a shorter prompt wrote",
    ),
    Fault(
        "steering/checked.py",
        "if not any(map(_counts, asked.values())):",
        "if False:",
        RESOLVE,
        "all weights 0 gives random text",
    ),
    Fault(
        "steering/checked.py",
        "if not 1 <= values.top_k <= limits.top_k:",
        "if not 1 <= values.top_k:",
        RESOLVE,
        "a caller takes as many candidates as it likes",
    ),
    Fault(
        "steering/rules.py",
        "if rule.stream not in dict(weights):",
        "if False:",
        RESOLVE,
        "a plan reads a stream that does not run",
    ),
    Fault(
        "steering/spec.py",
        "if not low <= asked[0] <= asked[1] <= high:",
        "if not low <= asked[0] <= asked[1]:",
        "tests/steering/test_spec.py",
        "a profile widens the server's range",
    ),
    Fault(
        "steering/spec.py",
        "if not inline and field not in OVERRIDABLE_ALWAYS:",
        "if False:",
        "tests/steering/test_spec.py",
        "callers override profiles that they may only take",
    ),
    Fault(
        "steering/adapters.py",
        "if (use.stream, use.digest) in uses:",
        "if False:",
        "tests/steering/test_adapters.py",
        "an adapter named twice counts once, silently",
    ),
    Fault(
        "steering/adapters.py",
        "if not low <= one.weight <= high:",
        "if not low <= one.weight:",
        "tests/steering/test_adapters.py",
        "any weight is taken",
    ),
    # --- steering: the worker --------------------------------------------------------------------
    Fault(
        "steering/worker/plan/request_state.py",
        "offsets[index[name]] = prompt_len - len(token_ids)",
        "offsets[index[name]] = payload.pad",
        STATES,
        "a stream's own prompt is read at wrong positions",
    ),
    Fault(
        "steering/worker/plan/request_state.py",
        "full = uses.all(0) & ~lags & ~own",
        "full = uses.all(0) & ~own",
        STATES,
        "padding is read by streams as text",
    ),
    Fault(
        "steering/worker/plan/request_state.py",
        "((coef != 0) == uses[0]).all() and uses[0, 0]",
        "uses[0, 0]",
        STATES,
        "rows with other streams take the path of equal rows",
    ),
    Fault(
        "steering/worker/readout/watch.py",
        "return (numbers - numbers) != 0",
        "return numbers != numbers",
        "tests/steering/worker/test_watch.py",
        "infinite scores are not noticed",
    ),
    Fault(
        "steering/worker/readout/watch.py",
        "more if flags is None else flags | more",
        "more",
        "tests/steering/worker/test_watch.py",
        "a later stream's health hides an earlier one's fault",
    ),
)
