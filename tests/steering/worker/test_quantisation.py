"""Quantisation rules name layers as the checkpoint does, whatever the stream is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform

from steering.language import original_prefixes
from steering.worker.streams.quantisation import (
    CheckpointName,
    _not_on_cpus,
    ask_by_checkpoint_names,
)

LEFT, KEPT = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"

_LINEAR = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": [LEFT]},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _LINEAR}},
        "ignore": [LEFT],
    },
    "auto_gptq": {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True,
        "modules_in_block_to_quantize": [KEPT, LEFT],
        "dynamic": {r"-:model\.layers\.0\.": {}},
    },
    "auto_awq": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
        "modules_to_not_convert": [LEFT],
    },
    "modelopt": {
        "quant_method": "modelopt",
        "quantization": {"quant_algo": "FP8", "exclude_modules": [LEFT]},
    },
}  # fmt: skip


def _layer() -> Any:
    return object.__new__(LinearBase)


@pytest.mark.parametrize("stream", ["base", "chat", "model"])
@pytest.mark.parametrize("scheme", CONFIGS)
def test_an_exclusion_holds_in_every_scheme(scheme: str, stream: str) -> None:
    config = get_quantization_config(scheme).from_config(dict(CONFIGS[scheme]))
    ask_by_checkpoint_names(config, stream, {})
    assert isinstance(
        config.get_quant_method(_layer(), f"{stream}.{LEFT}"), UnquantizedLinearMethod
    )


_INT8 = {**_LINEAR, "type": "int", "strategy": "channel"}


@pytest.mark.skipif(not current_platform.is_cpu(), reason="GPUs run these")
def test_what_a_cpu_cannot_run_is_refused() -> None:
    """FP8 without AMX, and adapters on int8 weights."""
    amx = torch.cpu._is_amx_tile_supported()
    for name in ("fp8", "compressed-tensors"):
        config = get_quantization_config(name).from_config(dict(CONFIGS[name]))
        assert (_not_on_cpus(config, adapts=False) is None) == amx
    inputs = {**_INT8, "strategy": "token", "dynamic": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": _INT8, "input_activations": inputs}}
    int8 = {**CONFIGS["compressed-tensors"], "format": "int-quantized", "config_groups": groups}
    config = get_quantization_config("compressed-tensors").from_config(int8)
    assert _not_on_cpus(config, adapts=False) is None
    assert "int8" in str(_not_on_cpus(config, adapts=True))


class _Recorder:
    """A config that asks itself, as the schemes do that quantise while they load."""

    def __init__(self, online: _Recorder | None = None) -> None:
        self.seen: list[str] = []
        self.online_quantization_config = online

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        return self.resolve_quant_method_cls(layer, prefix)

    def resolve_quant_method_cls(self, layer: Any, prefix: str) -> None:
        self.seen.append(prefix)


def test_the_stream_is_taken_off_once() -> None:
    """Also where one method asks the other, and a stream is called as the checkpoint's layers."""
    online = _Recorder()
    config = _Recorder(online)
    ask_by_checkpoint_names(config, "model", {})
    for asked in (config, online):
        asked.get_quant_method(None, f"model.{KEPT}")
        asked.resolve_quant_method_cls(None, f"model.{KEPT}")
        assert asked.seen == [KEPT, KEPT]
        assert all(type(name) is CheckpointName for name in asked.seen)


@pytest.mark.parametrize(
    ("tensors", "layer", "original"),
    [
        (
            ["model.language_model.layers.0.mlp.up_proj.weight", "lm_head.weight"],
            "chat.model.layers.0.mlp.up_proj",
            "model.language_model.layers.0.mlp.up_proj",
        ),
        (
            ["language_model.model.layers.0.mlp.up_proj.weight"],
            "chat.model.layers.3.mlp.up_proj",
            "language_model.model.layers.3.mlp.up_proj",
        ),
        (
            ["vision_tower.x.weight", "language_model.lm_head.weight"],
            "chat.lm_head",
            "language_model.lm_head",
        ),
        (["model.layers.0.mlp.up_proj.weight"], "chat.model.norm", "model.norm"),
    ],
)
def test_a_language_part_is_asked_for_by_the_whole_checkpoints_names(
    tensors: list[str], layer: str, original: str
) -> None:
    config = _Recorder()
    ask_by_checkpoint_names(config, "chat", original_prefixes(tensors))
    config.get_quant_method(None, layer)
    assert config.seen == [original]
