"""The layers that a config names are those that PEFT takes, by PEFT's own functions."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig
from peft.tuners.ia3 import IA3Model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters.errors import BadAdapter
from adapters.formats.inspect import read_artefact
from adapters.formats.kinds import Ia3, Lora, Vera
from adapters.formats.selectors import Selectors, named_by
from tests.adapters.kinds import Case, lora, make, make_base, with_peft

NAMES = (
    *(f"model.layers.{i}.{n}" for i in (0, 1, 10, 11) for n in (
        "self_attn.q_proj", "self_attn.my_q_proj", "mlp.down_proj", "mlp.experts.0.up_proj")),
    "transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_proj", "lm_head", "model.embed_tokens",
    "q_proj", "layers.1.q_proj", "model.layers.1", "decoder.block.3.layers.1.v",
)  # fmt: skip

CHOICES: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "model.layers.1.mlp.down_proj"], "layers_to_transform": [0]},
    {"target_modules": ["self_attn.q_proj", "v"], "layers_to_transform": 1},
    {"target_modules": ["down_proj", "up_proj"], "layers_to_transform": [0, 1]},
    {"target_modules": ["q_proj", "v"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
    {"target_modules": ["v"], "layers_to_transform": [1], "layers_pattern": ["nope", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": None},
    {"target_modules": ["q_proj", "c_proj"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": "q_proj"},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": r"model\.layers\.(0|1)\..*"},
    {"target_modules": r"^(?!.*mlp).*(q_proj|c_attn)"},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "q_proj"]},
    {"target_modules": ["q_proj", "v"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj"], "exclude_modules": []},
    {"target_modules": ["q_proj"], "exclude_modules": "q_proj"},
    {"target_modules": []},
)


@pytest.mark.parametrize("given", CHOICES, ids=str)
@pytest.mark.parametrize(("ours", "theirs"), [(Lora, LoraConfig), (Vera, VeraConfig),
                                              (Ia3, IA3Config)])  # fmt: skip
def test_the_same_layers_as_peft(given: dict[str, Any], ours: Any, theirs: Any) -> None:
    known = {key: value for key, value in given.items() if key in ours.keys}
    extra = {"target_parameters": None} if theirs is LoraConfig else {}
    config = theirs(**known, **extra)
    selectors = Selectors(given, ours.keys)
    for name in NAMES:
        taken = bool(check_target_module_exists(config, name))
        assert (selectors.left_out_by(name) is None) == taken, name


PATTERNS: tuple[dict[str, int], ...] = (
    {"q_proj": 1, "down_proj": 2}, {"layers.1.self_attn.q_proj": 1, "q_proj": 2},
    {"model.layers.0.self_attn.q_proj": 1, r".*layers\.1\d\..*": 2}, {r"^q_proj": 1},
    {r"(q|c)_(proj|attn)": 1, r"[^.]*_proj": 2}, {r"layers\.\d+\.mlp.*(up|down)_proj": 3}, {},
    {"experts.0.up_proj": 4},
)  # fmt: skip


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_the_same_ranks_as_peft(patterns: dict[str, int]) -> None:
    config = {"target_modules": ["q_proj"], "rank_pattern": patterns}
    rank = Selectors(config, Lora.keys).lookup("rank_pattern", 8)
    for name in NAMES:
        assert rank(name) == patterns.get(get_pattern_key(patterns.keys(), name), 8), name


@pytest.mark.parametrize("given", [["down_proj"], ["proj", "h.1.attn.c_attn"], r".*mlp.*", []])
def test_the_same_feedforward_layers_as_peft(given: Any) -> None:
    config = IA3Config(target_modules=["down_proj"], feedforward_modules=None)
    config.feedforward_modules = given
    rule = named_by(
        given, "feedforward_modules", Selectors({"target_modules": []}, Ia3.keys).budget
    )
    for name in NAMES:
        assert rule(name) == IA3Model._check_target_module_feedforward(config, name), name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target_modules": ".*", "layers_to_transform": [1]}, "layers_to_transform: goes with"),
        ({"target_modules": ".*", "layers_pattern": "h"}, "layers_pattern: goes with"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern: goes with"),
    ],
)
def test_configs_that_peft_refuses_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="layers"):
        LoraConfig(**given)
    with pytest.raises(BadAdapter, match=says):
        Selectors(given, Lora.keys)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target_modules": None}, "target_modules: must name the layers"),
        ({"target_modules": [1]}, "target_modules: neither"),
        ({"target_modules": "(a"}, "target_modules: not an expression"),
        ({"target_modules": ["q"], "exclude_modules": {"a": 1}}, "exclude_modules: neither"),
        ({"target_modules": ["q"], "layers_to_transform": [True]}, "layers_to_transform: neither"),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "(a+)+"},
         "layers_pattern: an expression"),
    ],
)  # fmt: skip
def test_selectors_that_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BadAdapter, match=says):
        Selectors(given, Lora.keys)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_hostile_expression_ends_soon(key: str) -> None:
    text = "(?=(?:(?=.*z).)*z)" * 200
    config = {"target_modules": ["q_proj"], key: {text: 1} if key == "rank_pattern" else text}
    start = time.monotonic()
    selectors = Selectors(config, Lora.keys)
    rank = selectors.lookup("rank_pattern", 8)
    long = [f"{'z' * 290}{i}" for i in range(999)]
    with pytest.raises(BadAdapter, match=rf"{key}: the expressions take too long"):
        print([(selectors.left_out_by(name), rank(name)) for name in long])
    assert time.monotonic() - start < 30


# ---- adapters with tensors of layers that their config leaves out ----------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*layers\.0.*"},
    ],
    ids=str,
)
def test_tensors_that_peft_drops_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """They were applied, and answers were up to 7 nats off."""
    base = make_base(tmp_path / "base", "llama")
    folder = make(Case("", lora(target_modules=["q_proj", "v_proj"])), tmp_path / "lora", base)
    whole = with_peft(base, [folder])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    part = with_peft(base, [folder])
    ids = torch.tensor([[11, 40, 3, 77]])
    assert (whole(ids).logits - part(ids).logits).abs().max() > 0.1
    (key,) = [key for key in changes if key != "layers_pattern"]
    with pytest.raises(BadAdapter, match=f"{key} leaves out, and PEFT drops them"):
        read_artefact(folder)


def test_peft_loads_biases_whatever_the_config_says(tmp_path: Path) -> None:
    """So do we: the tensors tell."""
    base = make_base(tmp_path / "base", "qwen2")
    folder = make(Case("", lora(bias="lora_only")), tmp_path / "lora", base)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "none"}))
    q = "model.layers.0.self_attn.q_proj"
    tensors = load_file(folder / "adapter_model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model, folder)
    saved = tensors[f"base_model.model.{q}.base_layer.bias"]
    assert torch.equal(model.base_model.model.get_submodule(q).base_layer.bias, saved)
    assert read_artefact(folder).parts[0][q].bias is not None
    tensors[f"base_model.model.{q}.bias"] = tensors.pop(f"base_model.model.{q}.base_layer.bias")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(BadAdapter, match=r"base_layer\.bias; rename it"):
        read_artefact(folder)


MANY = [f"k{i:06d}" for i in range(100_000)]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"target_modules": f"([{''.join(chr(0x4E00 + 2 * i) for i in range(9900))}]|x|.)*"}, ""),
        ({"target_modules": [*MANY, "q"], "layers_to_transform": [1]}, ""),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": MANY[:9000]}, ""),
        ({"target_modules": ["q"], "rank_pattern": {"(a|b)*x" * 1400 + n: 1 for n in MANY[:99]}},
         "rank_pattern"),
    ],
    ids=["a set of letters", "a list of names", "layers_pattern", "reading expressions"],
)  # fmt: skip
def test_hostile_configs_take_seconds_at_most(config: dict[str, Any], key: str) -> None:
    """A config has at most 1 MiB, and a file's header names at most some 80,000 layers."""
    names = [f"m{i}." + "x." * 120 + "q" for i in range(10_000)]
    start = time.process_time()
    with contextlib.suppress(BadAdapter):
        selectors = Selectors(config, Lora.keys)
        find = selectors.lookup(key, 0) if key else selectors.left_out_by
        for name in names:
            find(name)
            assert time.process_time() - start < 20
    assert time.process_time() - start < 20


@pytest.mark.parametrize("count", [80, 2000])
def test_a_key_for_every_layer_costs_little(count: int) -> None:
    """EVA writes ranks and alphas so; a list of targets may be as long."""
    names = [f"model.layers.{i}.{part}" for i in range(count)
             for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]  # fmt: skip
    ranks = {name: i for i, name in enumerate(names)}
    start = time.monotonic()
    selectors = Selectors({"target_modules": names, "rank_pattern": ranks}, Lora.keys)
    rank = selectors.lookup("rank_pattern", 0)
    some = names if count < 100 else names[::100]
    assert all(selectors.left_out_by(n) is None and rank(n) == ranks[n] for n in some)
    assert time.monotonic() - start < 5


def test_dots_of_plain_keys_stand_for_any_letter_and_the_first_key_wins() -> None:
    for patterns in ({"layers.1": 1}, {"a.b": 1, "b": 2}, {"b": 1, "a.b": 2}, {".*b": 1, "b": 2},
                     {"b": 3, ".*b": 4}, {"x": 1, "[b]": 2, "b": 3}):  # fmt: skip
        config = {"target_modules": ["q"], "rank_pattern": patterns}
        rank = Selectors(config, Lora.keys).lookup("rank_pattern", 9)
        for name in (
            "a.b",
            "axb",
            "m.a.b",
            "m.axb",
            "b",
            "layers11",
            "m.layersX1",
            "layers.1",
            "ab",
        ):
            assert rank(name) == patterns.get(get_pattern_key(patterns.keys(), name), 9), name
