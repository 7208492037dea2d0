"""Heads as they are read from files: which numbers they give, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from steering.heads import HeadError, find_head
from steering.worker.readout.heads import Head, body_weights

WIDTH = 6
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_head_computes_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    weight, bias = tensor(1, WIDTH).to(dtype), tensor(1, seed=2).to(dtype)
    names = {
        "v_head.summary.weight": weight,
        "v_head.summary.bias": bias,
        "lm_head.weight": tensor(3, WIDTH),
    }
    head = Head(find_head(saved(tmp_path / "h", names), "value", WIDTH))
    want = (X.to(dtype).double() @ weight[0].double() + bias.double()).numpy()
    assert head(X.to(dtype)).numpy() == pytest.approx(want, abs=1e-6)
    assert not list(head.parameters()), "vLLM would look for it in the base's checkpoint"


def test_two_labels_are_the_log_odds_of_the_second(tmp_path: Path) -> None:
    weight, bias = tensor(2, WIDTH), tensor(2, seed=2)
    folder = saved(tmp_path / "h", {"score.weight": weight, "score.bias": bias})
    head = Head(find_head(folder, "classifier", WIDTH))
    want = functional.linear(X, weight, bias).softmax(-1)[:, 1]
    assert head(X).sigmoid().numpy() == pytest.approx(want.numpy(), abs=1e-6)


def test_the_defer_token_is_the_last_row(tmp_path: Path) -> None:
    table = tensor(11, WIDTH)
    folder = saved(tmp_path / "h", {"lm_head.weight": table})
    found = Head(find_head(folder, "classifier", WIDTH, base_rows=10))
    assert found(X).numpy() == pytest.approx((X @ table[-1]).numpy(), abs=1e-6)
    with pytest.raises(HeadError, match="no classifier head"):
        find_head(folder, "classifier", WIDTH, base_rows=11)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_a_small_network(tmp_path: Path, activation: str) -> None:
    first, last = tensor(4, WIDTH), tensor(1, 4)
    layers = {"0.weight": first, "0.bias": tensor(4, seed=3), "2.weight": last}
    folder = saved(tmp_path / "h", layers, activation=activation)
    act = torch.tanh if activation == "tanh" else getattr(functional, activation)
    want = act(X @ first.T + layers["0.bias"]) @ last[0]
    head = Head(find_head(folder, "classifier", WIDTH))
    assert head(X).numpy() == pytest.approx(want.numpy(), abs=1e-6)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_refused(tmp_path: Path, number: float) -> None:
    weight = tensor(1, WIDTH)
    weight[0, 3] = number
    found = find_head(saved(tmp_path / "h", {"score.weight": weight}), "value", WIDTH)
    with pytest.raises(HeadError, match="not finite"):
        Head(found)


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q", "gone"]}


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **config}))
    return folder


def pair(module: str) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{module}.lora_"
    return {f"{prefix}A.weight": tensor(2, WIDTH), f"{prefix}B.weight": tensor(4, 2, seed=5)}


@pytest.mark.parametrize(
    ("config", "scale", "turned"),
    [
        ({}, 3.0, False),
        ({"use_rslora": True}, 6 / 2**0.5, False),
        ({"fan_in_fan_out": True}, 3.0, True),
    ],
)
def test_a_lora_is_merged_and_heads_stay_out(
    tmp_path: Path, config: dict[str, Any], scale: float, turned: bool
) -> None:
    parts = pair("model.q")
    head = {"base_model.model.score.weight": tensor(1, WIDTH)}
    folder = adapter(tmp_path / "a", {**parts, **head}, **config)
    weight = tensor(WIDTH, 4) if turned else tensor(4, WIDTH)
    given = [("model.q.weight", weight), ("model.k.weight", weight), ("score.weight", weight)]
    found = dict(body_weights(given, folder))
    a, b = parts.values()
    delta = scale * (b @ a)
    want = weight + (delta.T if turned else delta)
    assert found.keys() == {"model.q.weight", "model.k.weight"}
    assert torch.allclose(found["model.q.weight"], want, atol=1e-6)
    assert found["model.k.weight"] is weight


def test_a_merged_weight_is_not_rounded_to_the_checkpoints_type(tmp_path: Path) -> None:
    """The model that it is copied into may have a finer one."""
    parts = pair("model.q")
    weight = tensor(4, WIDTH).bfloat16()
    found = dict(body_weights([("model.q.weight", weight)], adapter(tmp_path / "a", parts)))
    a, b = parts.values()
    want = weight.float() + 3.0 * (b @ a)
    assert torch.allclose(found["model.q.weight"].float(), want, atol=1e-6)
    assert not torch.allclose(want.bfloat16().float(), want, atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (pair("model.gone"), {}, "changes model.gone, which the model lacks"),
        (pair("model.q"), {"use_dora": True}, "use_dora is true, and its vector is missing"),
        (pair("model.q"), {"peft_type": "IA3"}, "another kind of adapter"),
        (pair("model.q"), {"init_lora_weights": "lora_ga"}, "init_lora_weights: .*conversion"),
        (pair("model.q"), {"modules_to_save": ["lm_head"]}, "also changes lm_head"),
        (pair("model.q"), {"target_modules": ["k"]}, "target_modules leaves out"),
        (
            pair("model.q") | {"base_model.model.model.q.lora_B.bias": tensor(4)},
            {"lora_bias": True},
            "not a plain LoRA",
        ),
        (pair("model.q"), {"fan_in_fan_out": True}, "changes model.q.weight by"),
        ({"base_model.model.model.q.weight": tensor(4, WIDTH)}, {}, "also changes q"),
        ({n: t * float("nan") for n, t in pair("model.q").items()}, {}, "not finite"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], words: str
) -> None:
    folder = adapter(tmp_path / "a", tensors, **config)
    with pytest.raises(HeadError, match=words):
        list(body_weights([("model.q.weight", tensor(4, WIDTH))], folder))
