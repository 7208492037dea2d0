"""Every kind of adapter inside the engine: alone as PEFT computes it, mixed by the definition.

All of them share batches with each other, with plain LoRA, with packs of several kinds and with
rows that have none. The base has biases in q, k and v, one companion in all layers, and one a fused
layer with biases. The engine has too few blocks for the larger tests, so requests are preempted.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters.errors import DoesNotFit
from adapters.formats.base import base_shapes
from steering.engine_args import adapter_engine_args
from steering.worker.adapting.base_layers import EngineLayers
from tests.adapters import kinds
from tests.adapters.kinds import ALL, ATTENTION, GPT2, OPT, adalora, ia3, lora, vera
from tests.adapters.layers import CheckpointLayers
from tests.engine.driver import BLOCK, Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE, assert_exact, prompt
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine

GUIDANCE: Mapping[str, object] = {"method": "guidance", "negative": "twin", "strength": 1.4}
MIX: Mapping[str, object] = {"method": "mix", "weights": {"base": 0.6, "opt": 0.5, "plain": -0.4}}

BASE = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "dora-biases": lora(use_dora=True, bias="lora_only", use_rslora=True, target_modules=ATTENTION),
    "offset": lora(lora_bias=True, use_rslora=True),
    "biases": lora(bias="all", target_modules=["o_proj", "v_proj"]),
    "ia3": ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "ia3-outputs": ia3(["q_proj", "k_proj", "o_proj", "gate_proj"], []),
    "adalora": adalora(),
    "vera": vera(bias="vera_only"),
}
COMPANION = {
    "opt-dora": lora(use_dora=True, bias="lora_only", target_modules=OPT),
    "opt-biases": lora(bias="lora_only", target_modules=OPT),
    "opt-ia3": ia3(["q_proj", "k_proj", "fc1"], []),
}
FUSED = {
    "gpt2-dora": lora(use_dora=True, target_modules=GPT2, fan_in_fan_out=True),
    "gpt2-ia3": ia3(["c_attn", "c_fc"], []),
}

Asked = tuple[Mapping[str, object] | None, tuple[Use, ...]]
"""What a request asks of the streams, and its adapters."""

ALONE = [*BASE, "pack"]
MIXES: list[tuple[Use, ...]] = [
    (Use("dora", 0.6),),
    (Use("dora", -0.5), Use("lora", 0.8)),
    (Use("dora", 0.7), Use("dora-biases", 0.5), Use("offset", -0.3)),
    (Use("ia3", 0.5), Use("dora-biases")),
    (Use("ia3-outputs", 1.4), Use("biases", 0.5), Use("vera", 0.3)),
    (Use("dora", 0.0), Use("lora", 0.5)),
    (Use("pack", 0.8, top_k=3, temperature=15.0), Use("dora", 0.4)),
    (Use("pack", top_k=1), Use("biases")),
]
STEERED: list[Asked] = [
    (GUIDANCE, (Use("dora", stream="twin"), Use("biases"))),
    (GUIDANCE, (Use("ia3", stream="twin"), Use("pack", stream="base"))),
    (MIX, (Use("opt-dora", stream="opt"), Use("gpt2-dora", stream="plain"), Use("dora"))),
    (MIX, (Use("opt-biases", stream="opt"), Use("gpt2-ia3", stream="plain"))),
    (MIX, (Use("opt-ia3", 0.5, stream="opt"), Use("opt-dora", 0.5, stream="opt"))),
]


def make_pack(folder: Path, base: Path) -> Path:
    """A native pack whose tasks are of several kinds; the last leaves the MLP alone."""
    configs = {
        "plain": lora(r=3),
        "dora": lora(r=2, use_dora=True),
        "biases": lora(bias="all", target_modules=["o_proj"]),
        "ia3": ia3(["q_proj", "v_proj"], []),
    }
    for i, (name, config) in enumerate(configs.items()):
        kinds.make(kinds.Case(name, config), folder / name, base, seed=60 + i)
    draw = torch.Generator().manual_seed(5)
    save_file(
        {
            f"{module}.moe_gate.weight": width**-0.5
            * torch.randn(len(configs), width, generator=draw)
            for module, width in _inputs(base).items()
        },
        folder / "gates.safetensors",
    )
    settings = {"layout": "native", "top_k": 2, "temperature": 1, "tasks": list(configs)}
    (folder / "meteora.json").write_text(json.dumps(settings))
    return folder


def _inputs(base: Path) -> dict[str, int]:
    """Linear layers of the decoder and the width of their inputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    return {
        name: module.in_features
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ALL
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A base with companions and a twin, and slots for four sets at a time."""
    folder = tmp_path_factory.mktemp("models")
    streams: dict[str, tuple[str, int] | str] = {
        "opt": ("opt", VOCAB_SIZE),
        "plain": ("gpt2", VOCAB_SIZE),
        "twin": "base",
    }
    slots = {**adapter_engine_args(4, 48), "max_cpu_loras": 6, "num_gpu_blocks_override": 24}
    found = Engine(folder, ("qwen2", VOCAB_SIZE), streams, **slots)
    for seed, (stream, configs) in enumerate(
        {"base": BASE, "opt": COMPANION, "plain": FUSED}.items()
    ):
        base = found.folders[stream]
        made = {
            name: kinds.make(kinds.Case(name, config), folder / name, base, seed=10 * seed + i)
            for i, (name, config) in enumerate(configs.items())
        }
        if stream == "base":
            made["pack"] = make_pack(folder / "pack", base)
        found.load_adapters(made, stream)
    yield found
    del found
    gc.collect()


@pytest.mark.parametrize("stream", ["base", "opt", "plain"])
def test_the_engines_layers_are_the_checkpoints(engine: Engine, stream: str) -> None:
    """Also packed ones, slices of fused ones, and those whose weights are stored transposed."""
    folder = engine.folders[stream]
    known = CheckpointLayers(folder)
    modules = [n.removesuffix(".weight") for n in base_shapes(folder).tensors if "norm" not in n]
    modules = [module for module in modules if known.linear(module) is not None]
    assert len(modules) > 10

    def look(worker: Any) -> None:
        layers = EngineLayers(worker.model_runner.lora_manager._adapter_manager, stream, {})
        for module in modules:
            shape = known.linear(module)
            assert layers.linear(module) == shape and shape is not None
            x = torch.randn(3, shape[1])
            torch.testing.assert_close(layers.product(module, x), known.product(module, x))
            torch.testing.assert_close(layers.row_norms(module), known.row_norms(module))
            bias, own = layers.bias(module), known.bias(module)
            assert (bias is None) == (own is None)
            assert own is None or bias is None or torch.equal(bias, own)
        assert layers.linear("model.layers.0.nothing") is None
        with pytest.raises(DoesNotFit, match="cannot adapt this layer"):
            layers.product("model.embed_tokens", torch.randn(1, 4))

    engine.llm.collective_rpc(look)


def test_row_norms_are_found_in_pieces_and_once(engine: Engine) -> None:
    def look(worker: Any) -> None:
        norms: dict[str, torch.Tensor] = {}
        layers = EngineLayers(worker.model_runner.lora_manager._adapter_manager, "base", norms)
        module = "model.layers.0.mlp.down_proj"
        assert sum(1 for _ in layers.measure(module)) == 2  # 160 columns
        assert list(layers.measure(module)) == []
        assert list(norms) == ["base.model.layers.0.mlp.down_proj"]
        # q, k and v are read together.
        assert sum(1 for _ in layers.measure("model.layers.0.self_attn.q_proj")) == 1
        assert list(layers.measure("model.layers.0.self_attn.v_proj")) == []

    engine.llm.collective_rpc(look)


def batch(seed: int, asked: Sequence[Asked]) -> list[Case]:
    """Requests that join and leave at different steps; some prompts are prefilled in chunks."""
    rng = random.Random(seed)
    return [
        Case(prompt(rng, 3, 120), spec, {}, rng.randint(4, 9), rng.randrange(9), adapters=own)
        for spec, own in asked
    ]


def test_each_kind_alone_is_what_peft_computes(engine: Engine) -> None:
    cases = batch(1, [(None, (Use(name),)) for name in ALONE])
    assert_exact(engine, cases, engine.run(cases))


def test_all_kinds_share_batches(engine: Engine) -> None:
    asked: list[Asked] = [*((None, own) for own in MIXES), (None, ()), (None, ()), *STEERED]
    before = engine.preemptions()
    for seed in (2, 3):
        cases = batch(seed, asked)
        assert_exact(engine, cases, engine.run(cases))
    long = batch(4, asked[:12])
    cases = [Case(c.prompt, c.spec, {}, 2 * BLOCK, adapters=c.adapters) for c in long]
    assert_exact(engine, cases, engine.run(cases))
    assert engine.preemptions() > before


def test_every_kind_changes_the_answers(engine: Engine) -> None:
    """Else the tests above could pass with adapters that do nothing."""
    ids = prompt(random.Random(5), 30, 30)
    cases = [Case(ids, adapters=own) for own in [(), *((Use(n),) for n in ALONE), *MIXES]]
    found = [logprobs(output) for output in engine.run(cases)]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert one != pytest.approx(other, abs=100 * TOLERANCE)


def test_rows_without_an_adapter_keep_their_bits(engine: Engine) -> None:
    rng = random.Random(6)
    prompts = [prompt(rng, 20, 60) for _ in range(8)]
    uses = [(), (Use("dora"),), (), (Use("dora", 0.0),), (Use("ia3"),), (), (Use("pack"),), ()]
    alone = engine.run([Case(ids, max_tokens=8) for ids in prompts], salt="alone")
    pairs = zip(prompts, uses, strict=True)
    beside = engine.run([Case(ids, max_tokens=8, adapters=u) for ids, u in pairs], salt="beside")
    for own, got, base in zip(uses, beside, alone, strict=True):
        if not own or own[0].weight == 0:
            assert tokens(got) == tokens(base)
            assert logprobs(got) == logprobs(base)  # bit for bit
        else:
            assert logprobs(got) != pytest.approx(logprobs(base), abs=100 * TOLERANCE)


def test_sets_that_are_read_ahead_are_the_same(engine: Engine) -> None:
    ids = prompt(random.Random(8), 20, 40)
    case = Case(ids, adapters=(Use("dora-biases"), Use("ia3-outputs", 0.3), Use("pack")))
    _, found = engine.adapted(case)
    assert found is not None
    path, pieces = found.lora_request()["lora_path"], 1
    while not engine.llm.collective_rpc("coxswain_read_ahead", args=(path, 0.0))[0]["done"]:
        pieces += 1
    assert pieces >= 3 * len(ALL)  # at least one for each layer
    assert_exact(engine, [case], engine.run([case]))


def test_prefixes_are_shared_only_under_the_same_adapters(engine: Engine) -> None:
    ids = prompt(random.Random(7), 100, 100)
    names = ("dora", "ia3", "biases", "pack")
    uses = [(), *((Use(name),) for name in names), (Use("dora", 0.5),)]
    for own in uses:
        case = Case(ids, max_tokens=4, adapters=own)
        cold, warm = (engine.run([case], salt="hits")[0] for _ in range(2))
        assert cold.num_cached_tokens == 0
        assert warm.num_cached_tokens >= 2 * BLOCK
        assert_exact(engine, [case, case], [cold, warm])
