"""PEFT's features that this server refuses, each with a remedy in one sentence.

Kinds and keys are those of peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adapters.errors import BadAdapter
from adapters.formats.base import TABLES
from adapters.formats.config import CONFIG, bad_key

_LONGEST_NAME = 60
"""Letters of a module's name in a sentence."""

SERVED = ("LORA", "ADALORA", "VERA", "IA3")

_MERGE = "merge it with PEFT's merge_and_unload and serve the result as a base or a companion"
_CONVERT = f"write it as a LoRA with PEFT's save_as_lora and look at what that loses, or {_MERGE}"
_TRAIN = "train a LoRA adapter on the same data instead"

_PROMPT = "adds learned states before the prompt and changes no layer"
_ROTATION = "multiplies each layer's weight by a matrix"
_FULL = "adds a matrix of full rank to each layer's weight"

_KINDS = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT",
                     "CARTRIDGE", "ADAPTION_PROMPT"), (_PROMPT, _TRAIN)),
    **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD", "GLORA"), (_ROTATION, _MERGE)),
    **dict.fromkeys(("LOHA", "LOKR", "FOURIERFT", "HIRA", "SHIRA", "C3A", "WAVEFT", "MISS",
                     "PSOFT"), (_FULL, _CONVERT)),
    "XLORA": ("weighs its adapters by a network that reads a first pass over the text",
              "load its adapters one by one, or train a MeteoRA pack"),
    "POLY": ("mixes its adapters by learned tasks", _MERGE),
    "LN_TUNING": ("changes layer norms, which act before a layer's product", _MERGE),
    "TRAINABLE_TOKENS": ("replaces rows of the embedding table", _MERGE),
}  # fmt: skip
"""peft_type → (what it does, what to do)."""

_UNNAMED = ("changes the model in a way that this server does not compute", _MERGE)

_OPTIONS = {
    "layer_replication": ("repeats layers of the base", _MERGE),
    "use_qalora": ("averages groups of inputs first (QALoRA)", _MERGE),
    "use_bdlora": ("has block-diagonal factors (BD-LoRA)", _CONVERT),
    "target_parameters": ("changes bare parameters, such as the experts of a mixture", _MERGE),
    "velora_config": (
        "was trained with VeLoRA",
        "remove velora_config and the velora tensors, which matter in training only",
    ),
    "monteclora_config": (
        "was trained with MonteCLoRA",
        "remove monteclora_config and the monteclora tensors, which matter in training only",
    ),
    "arrow_config": ("is a router over other adapters (Arrow)", "load those adapters one by one"),
    "kasa_config": ("changes the base's weights when it is loaded (KaSA)", _MERGE),
    "megatron_config": (
        "was trained on Megatron's layers",
        "convert it to the layers of transformers",
    ),
}
"""Options of LoRA → (what the adapter does, what to do)."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's weights as they are."""

_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")
"""Their beginnings that subtract the first product from the base's weights."""


_CHANGED = (
    "this adapter belongs to weights that its initialisation changed, not to the base's: write it "
    "as a plain LoRA with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion="
    "the adapter as it was before training, saved with init_lora_weights=True)"
)

_ROUNDED = (
    "this adapter belongs to the weights that LoftQ rounded, not to the base's: save the rounded "
    f"model and serve it as the base, or {_MERGE}"
)


def check_kind(config: Mapping[str, Any]) -> str:
    """The kind of an adapter that is served.

    Raises:
        BadAdapter: it is of another kind.
    """
    kind = config.get("peft_type")
    if kind in SERVED:
        return str(kind)
    does, instead = _UNNAMED
    if isinstance(kind, str):
        does, instead = _KINDS.get(kind, _UNNAMED)
    raise BadAdapter(
        f"this kind of adapter is not served: it {does}; {instead}",
        field=f"{CONFIG}: peft_type",
        value=kind,
        allowed=", ".join(SERVED),
    )


def check_options(
    config: Mapping[str, Any], kind: str, left_alone: Callable[[str], bool] = lambda _: False
) -> None:
    """Refuses options that change what an adapter computes.

    Args:
        config: the adapter's.
        kind: its `peft_type`.
        left_alone: `modules_to_save` that are somebody else's business.

    Raises:
        BadAdapter: one is set.
    """
    _check_saved(config, left_alone)
    if kind in ("LORA", "ADALORA"):
        for key, (does, instead) in _OPTIONS.items():
            if config.get(key):
                raise bad_key(
                    key, f"this adapter {does}, which is not served; {instead}", config[key]
                )
        if tokens := config.get("trainable_token_indices"):
            message = also_changes("embed_tokens", "trainable_token_indices")
            raise bad_key("trainable_token_indices", message, tokens)
        if kind == "LORA":  # AdaLoRA begins with a product of 0, whatever this says
            _check_init(config)
    if config.get("use_dora") and (kind != "LORA" or config.get("lora_bias")):
        raise bad_key("use_dora", "PEFT knows no DoRA of this kind or with lora_bias", True)
    for key, value in config.items():
        if key not in _KNOWN and (value is True or (isinstance(value, dict) and value)):
            raise bad_key(
                key,
                "an option that this server does not know, so it may change what the adapter "
                "computes; remove it if it does not",
                value,
            )


def _check_saved(config: Mapping[str, Any], left_alone: Callable[[str], bool]) -> None:
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise bad_key("modules_to_save", "not a list of names", saved)
    for name in saved:
        if not left_alone(name):
            raise bad_key("modules_to_save", also_changes(name, "modules_to_save"), saved)


def also_changes(module: str, how: str) -> str:
    """What to say of a module that an adapter replaces, or of a table that it changes.

    Args:
        module: its name.
        how: the key of the config by which it does.
    """
    last = module.rsplit(".", 1)[-1][:_LONGEST_NAME]
    what = "the table of a vocabulary is" if last in TABLES else "a whole module is"
    return (f"this adapter also changes {last} ({how}), and {what} not changed per request; "
            f"{_MERGE}, or train without {last}")  # fmt: skip


def _check_init(config: Mapping[str, Any]) -> None:
    init = config.get("init_lora_weights", True)
    if not isinstance(init, str) or init.lower() in _PLAIN_INITS:
        return
    allowed: str | None
    why, allowed = "no initialisation that PEFT knows", f"true, false, {', '.join(_PLAIN_INITS)}"
    if init.lower().startswith(_CHANGING_INITS):
        why, allowed = _CHANGED, None
    elif init.lower() == "loftq":
        why, allowed = _ROUNDED, None
    raise bad_key("init_lora_weights", why, init, allowed)


_KNOWN = frozenset((
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "beta1", "beta2", "bias", "corda_config", "d_initial", "deltaT",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights", "init_r",
    "init_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "monteclora_config",
    "orth_reg_weight", "peft_type", "peft_version", "projection_prng_key", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "save_projection", "target_modules",
    "target_parameters", "target_r", "task_type", "tfinal", "tinit", "total_step",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
    "velora_config", "vera_dropout",
))  # fmt: skip
"""Keys whose meaning is known; those that matter are read or refused elsewhere."""
