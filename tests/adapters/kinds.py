"""Adapters of every kind that PEFT writes, random, and what this server does with each.

PEFT makes and saves them; nothing here uses our loading. `SERVED` and `REFUSED` are the rows of
docs/reference/adapter-kinds.md.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3Config

from tests.models import ARCHITECTURES, MAX_LENGTH, make_model

WEIGHTS = "adapter_model.safetensors"

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
GPT2 = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
OPT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def _phi3(**common: Any) -> Phi3Config:
    return Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=MAX_LENGTH, **common,
    )  # fmt: skip


BASES = {"phi3": _phi3, **ARCHITECTURES}
"""Architectures that the adapters are for; the layers of `phi3` are fused."""


def make_base(folder: Path, architecture: str, seed: int = 0) -> Path:
    """A tiny model of one of `BASES`."""
    with patch.dict(ARCHITECTURES, BASES):
        return make_model(folder, architecture, seed=seed)


Change = Callable[[Path], None]

_ORDINARY = {
    "peft_type", "task_type", "peft_version", "r", "lora_alpha", "init_r", "target_r", "total_step",
    "fan_in_fan_out", "loftq_config", "runtime_config", "eva_config", "inference_mode",
    "base_model_name_or_path", "vector_length", "oft_block_size", "boft_block_size",
    "encoder_hidden_size",
}  # fmt: skip
_BY_TARGET = ("read-out", "embedding table")


@dataclass(frozen=True)
class Case:
    """An adapter.

    Args:
        kind: what the page calls it.
        config: PEFT's.
        base: the architecture that it is for.
        says: of a refused one, a part of the sentence.
        change: what is done to the folder that PEFT has written.
        shown: how the page writes the config; by default what differs from PEFT's own.
        prepare: what is done to the PEFT model before its numbers are drawn.
        set: keys that are written into the config; PEFT's own code for them needs more than a
            config, or changes the model's structure.
    """

    kind: str
    config: Any
    base: str = "llama"
    says: str = ""
    change: Change | None = None
    shown: str = ""
    prepare: Callable[[Any], None] | None = None
    set: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the test."""
        return f"{self.kind}, {self.base}"

    @property
    def described(self) -> str:
        """PEFT's config, without what every adapter has."""
        if self.shown:
            return self.shown
        config = self.config()
        given = {f.name: getattr(config, f.name) for f in fields(config)}
        plain = {f.name: f.default for f in fields(config)}
        said = {
            k: sorted(v) if isinstance(v, set) else v
            for k, v in given.items()
            if k not in _ORDINARY and (v or plain[k] is True) and v != plain[k]
        }
        if not isinstance(config.target_modules if "target_modules" in given else "", str):
            listed = self.kind in _BY_TARGET
            said.pop("target_modules", None)
            said |= {"target_modules": sorted(config.target_modules)} if listed else {}
        said |= self.set
        shown = ", ".join(f"{key}={value!r}" for key, value in sorted(said.items()))
        return f"{type(config).__name__}({shown})"


def make(case: Case, folder: Path, base: Path, seed: int = 0) -> Path:
    """Writes an adapter whose effect is plain to see, by PEFT."""
    random = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        wrapped = get_peft_model(model, case.config())
        if case.prepare is not None:
            case.prepare(wrapped)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                _draw(name, parameter, random)
        wrapped.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | case.set
    path.write_text(json.dumps(config))
    if case.change is not None:
        case.change(folder)
    return folder


def _draw(name: str, parameter: torch.Tensor, random: torch.Generator) -> None:
    """Random numbers in a parameter of the adapter; those of the base stay."""

    def normal(gain: float) -> None:
        parameter.copy_(gain * torch.randn(parameter.shape, generator=random))

    last = name.rsplit(".", 1)[-1]
    if "lora_magnitude_vector" in name:  # so far the norms of the base's rows
        parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=random))
    elif "ia3_l" in name:
        parameter.copy_(0.4 + 1.2 * torch.rand(parameter.shape, generator=random))
    elif "lora_A" in name or "lora_B" in name:
        if parameter.dim() == 1:
            normal(0.2)
        else:
            normal((0.5 if "lora_B" in name else 1.0) * max(parameter.shape[1], 1) ** -0.5)
    elif "lora_E" in name or "vera_lambda" in name:
        normal(1.0)
    elif last == "bias" and parameter.requires_grad:
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    elif parameter.requires_grad and name.count("lora_") + name.count("trainable") > 0:
        normal(0.1)


def with_peft(base: Path, folders: Iterable[Path]) -> Any:
    """The base with one adapter after the other, in float64, by PEFT."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for folder in folders:
            model = PeftModel.from_pretrained(model, folder)
    return model.double().eval()


def lora(**more: Any) -> Callable[[], Any]:
    """Makes a config of LoRA."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **more}
    return lambda: LoraConfig(**given)


def ia3(targets: list[str], feedforward: list[str]) -> Callable[[], Any]:
    """Makes a config of IA3."""
    return lambda: IA3Config(
        target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM"
    )


def adalora(**more: Any) -> Callable[[], Any]:
    """Makes a config of AdaLoRA."""
    given = {"init_r": 4, "target_r": 2, "lora_alpha": 16, "total_step": 10, "target_modules": ALL}
    return lambda: AdaLoraConfig(**{**given, **more})


def vera(**more: Any) -> Callable[[], Any]:
    """Makes a config of VeRA."""
    return lambda: VeraConfig(**{"r": 8, "target_modules": ALL, **more})


def _cut_ranks(model: Any) -> None:
    """What AdaLoRA's training does: each layer keeps some of its ranks, one of them none."""
    names = [name for name, _ in model.base_model.model.named_modules() if name.endswith("_proj")]
    kept = {
        f"{name}.lora_E.default": [i < 4 - j % 5 for i in range(4)] for j, name in enumerate(names)
    }
    model.peft_config["default"].rank_pattern = kept


def shard(folder: Path) -> None:
    """Two files and an index in the place of one."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places: dict[str, str] = {}
    for i in range(2):
        file = f"adapter_model-0000{i + 1}-of-00002.safetensors"
        names = sorted(tensors)[i::2]
        save_file({name: tensors[name] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


RANKS = {"q_proj": 6, r"layers\.0\..*(up|down)_proj": 2}
ALPHAS = {r"^model\.layers\.1\.mlp.*": 3, "v_proj": 20}
EXPRESSION = r".*layers\.\d+\.(self_attn\.(q|v)_proj|mlp\..*_proj)"

SERVED = (
    Case("LoRA", lora()),
    Case("LoRA", lora(target_modules=GPT2, fan_in_fan_out=True), "gpt2"),
    Case("LoRA on fused layers", lora(target_modules=FUSED), "phi3"),
    Case("rsLoRA", lora(use_rslora=True)),
    Case("ranks and alphas by layer", lora(rank_pattern=RANKS, alpha_pattern=ALPHAS)),
    Case("layers by an expression", lora(target_modules=EXPRESSION, exclude_modules=r".*\.1\..*")),
    Case("layers by number", lora(layers_to_transform=[1], layers_pattern="layers")),
    Case("all linear layers", lora(target_modules="all-linear", exclude_modules=["k_proj"])),
    *(Case(f"LoRA, begun as {init}", lora(init_lora_weights=init, target_modules=ATTENTION))
      for init in ("gaussian", "eva", "orthogonal", "mica")),
    Case("LoRA in shards", lora(), change=shard, shown="adapter_model.safetensors.index.json"),
    Case("DoRA", lora(use_dora=True)),
    Case("DoRA", lora(use_dora=True), "qwen2"),
    Case("DoRA", lora(use_dora=True, target_modules=GPT2, fan_in_fan_out=True), "gpt2"),
    Case("DoRA", lora(use_dora=True, target_modules=FUSED), "phi3"),
    Case("DoRA and rsLoRA", lora(use_dora=True, use_rslora=True, rank_pattern=RANKS), "qwen2"),
    Case("DoRA and biases", lora(use_dora=True, bias="lora_only"), "qwen2"),
    Case("biases of adapted layers", lora(bias="lora_only", target_modules=OPT), "opt"),
    Case("biases of adapted layers",
         lora(bias="lora_only", target_modules=GPT2, fan_in_fan_out=True), "gpt2"),
    Case("all biases", lora(bias="all", target_modules=["o_proj", "v_proj"]), "qwen2"),
    Case("bias of B", lora(lora_bias=True, use_rslora=True), "qwen2"),
    Case("bias of B and biases", lora(lora_bias=True, bias="lora_only", target_modules=OPT), "opt"),
    Case("IA3", ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"])),
    Case("IA3", ia3(["q_proj", "v_proj", "up_proj", "down_proj"], ["down_proj"]), "qwen2"),
    Case("IA3", ia3(["qkv_proj", "gate_up_proj", "down_proj"], ["down_proj"]), "phi3"),
    Case("IA3 on outputs", ia3(["c_attn", "c_fc"], []), "gpt2"),
    Case("IA3 on outputs", ia3(["q_proj", "k_proj", "fc1"], []), "opt"),
    Case("AdaLoRA", adalora(), prepare=_cut_ranks),
    Case("AdaLoRA", adalora(target_modules=GPT2, fan_in_fan_out=True), "gpt2"),
    Case("VeRA", vera()),
    Case("VeRA", vera(target_modules=GPT2, fan_in_fan_out=True), "gpt2"),
    Case("VeRA and biases", vera(bias="vera_only", projection_prng_key=7), "qwen2"),
)  # fmt: skip
"""What this server serves."""


_TO_SAVE = "modules_to_save"
_MERGE = "merge_and_unload"
_INPUT = "scales the input"

REFUSED = (
    *(Case(f"LoRA, begun as {init}", lora(), set={"init_lora_weights": init},
           says="path_initial_model_for_weight_conversion")
      for init in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga")),
    Case("LoRA, begun as loftq", lora(), set={"init_lora_weights": "loftq"}, says="LoftQ"),
    Case("read-out", lora(target_modules=["q_proj", "lm_head"]), says=r"also changes lm_head"),
    Case("embedding table", lora(target_modules=["q_proj", "embed_tokens"]),
         says="also changes embed_tokens"),
    Case("saved read-out", lora(modules_to_save=["lm_head"]), says="also changes lm_head"),
    Case("saved embedding table", lora(modules_to_save=["embed_tokens"]),
         says="also changes embed_tokens"),
    Case("saved norms", lora(modules_to_save=["norm"]), says="also changes norm"),
    Case("added tokens", lora(trainable_token_indices=[3, 4]), says="also changes embed_tokens"),
    Case("biases of norms", lora(bias="all", target_modules=OPT), "opt", says="changes the norm"),
    Case("biases of norms", lora(bias="all", target_modules=GPT2, fan_in_fan_out=True), "gpt2",
         says="changes the norm"),
    Case("IA3 on inputs, other MLPs", ia3(["k_proj", "fc2"], ["fc2"]), "opt", says=_INPUT),
    Case("IA3 on inputs, other MLPs", ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]), "gpt2",
         says=_INPUT),
    Case("IA3 on inputs of attention", ia3(["k_proj", "o_proj"], ["o_proj"]), says=_INPUT),
    Case("VeRA without projections", vera(save_projection=False), says="save_projection"),
    Case("aLoRA with biases", lora(alora_invocation_tokens=[5, 6], bias="lora_only"),
         says="invocation tokens"),
    Case("QALoRA", lora(), set={"use_qalora": True}, says="QALoRA"),
    Case("BD-LoRA", lora(), set={"use_bdlora": {"nblocks": 2}}, says="BD-LoRA"),
    Case("KaSA", lora(), set={"kasa_config": {"beta": 1e-4}}, says="KaSA"),
    Case("VeLoRA", lora(), set={"velora_config": {"num_groups": 4}}, says="VeLoRA"),
    Case("MonteCLoRA", lora(), set={"monteclora_config": {"num_samples": 4}},
         says="MonteCLoRA"),
    Case("Arrow", lora(), set={"arrow_config": {"top_k": 2}}, says="Arrow"),
    Case("repeated layers", lora(), set={"layer_replication": [[0, 2], [1, 2]]},
         says="repeats layers"),
    Case("bare parameters", lora(), set={"target_parameters": ["experts.gate_up_proj"]},
         says="bare parameters"),
    Case("LoHa", lambda: peft.LoHaConfig(r=2, target_modules=ALL), says="save_as_lora"),
    Case("LoKr", lambda: peft.LoKrConfig(r=2, target_modules=ALL), says="save_as_lora"),
    Case("OFT", lambda: peft.OFTConfig(
        oft_block_size=8, r=0, target_modules=ATTENTION), says=_MERGE),
    Case("BOFT", lambda: peft.BOFTConfig(
        boft_block_size=8, target_modules=["q_proj"]), says=_MERGE),
    Case("HRA", lambda: peft.HRAConfig(r=2, target_modules=ATTENTION), says=_MERGE),
    Case("MiSS", lambda: peft.MissConfig(r=2, target_modules=ATTENTION), says="save_as_lora"),
    Case("VB-LoRA", lambda: peft.VBLoRAConfig(
        r=2, vector_length=16, target_modules=ATTENTION), says=_MERGE),
    Case("layer norms", lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"), says="layer norms"),
    Case("rows of the embedding table", lambda: peft.TrainableTokensConfig(token_indices=[3, 4]),
         says="embedding table"),
    Case("prompt tuning", lambda: peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4), says="before the prompt"),
    Case("prefix tuning", lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4), says="before the prompt"),
    Case("P-tuning", lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4), says="before the prompt"),
    Case("X-LoRA", lora(), set={"peft_type": "XLORA"}, says="first pass", shown="XLoraConfig"),
)  # fmt: skip
"""What this server does not serve."""
