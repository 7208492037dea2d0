"""Adapted models by other people's code: PEFT, and plain hooks for MeteoRA and for mixes.

A mix of adapters that are not all LoRA is, by definition, the layer's own output plus each one's
weight times what it changes of that output when it is alone: PEFT's output less the layer's, here
in float64. Nothing here uses our loading or our kernels.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from tests.adapters.vectors import acts, changes_of_heads, changes_of_states, conditions_of
from tests.reference import fresh


@dataclass(frozen=True)
class Applied:
    """An adapter as a request uses it.

    Args:
        folder: the adapter's.
        weight: what it is multiplied by.
        top_k: of a pack; None: its own.
        temperature: of a pack; None: its own.
        where: JSON, at which positions it acts; '': where its file says, or everywhere.
    """

    folder: Path
    weight: float = 1.0
    top_k: int | None = None
    temperature: float | None = None
    where: str = ""

    @property
    def is_vector(self) -> bool:
        """Whether it changes more than linear layers."""
        return (self.folder / "vector_config.json").is_file()

    @property
    def place(self) -> Any:
        """Where it acts, as JSON; None: everywhere."""
        if self.where:
            return json.loads(self.where)
        if self.is_vector:
            by_prompt = self.condition.get("gate") == "prompt"
            config = json.loads((self.folder / "vector_config.json").read_text())
            return config.get("where", "reply" if by_prompt else None)
        return None

    @property
    def condition(self) -> Any:
        """The config of a conditional vector; {} for others."""
        if not self.is_vector:
            return {}
        config = json.loads((self.folder / "vector_config.json").read_text())
        return config if config["kind"] == "conditional" else {}


@functools.cache
def adapted(base: Path, adapters: tuple[Applied, ...]) -> Any:
    """The model with its adapters, float32."""
    model: Any = fresh(base)
    if any(a.is_vector or a.place for a in adapters):
        return _by_positions(model, base, adapters)
    for applied in adapters:
        if (applied.folder / "meteora.json").is_file():
            _hook_meteora(model, base, applied)
    others = [a for a in adapters if not (a.folder / "meteora.json").is_file()]
    alone = len(adapters) == 1 and adapters[0].weight == 1
    if others and (alone or all(_is_lora(a.folder) for a in others)):
        return _with_peft(model, others).eval()
    for applied in others:
        for name, change in changes(base, applied.folder).items():
            model.get_submodule(name).register_forward_hook(_adds(change, applied.weight))
    return model


class _Positions:
    """At which positions of a text the tokens stand that a model reads now.

    Args:
        model: reads texts from their beginning, a prompt at once.
    """

    def __init__(self, model: Any) -> None:
        self.start = self.end = self.length = 0
        self.ids: list[int] = []
        self._met: dict[Applied, torch.Tensor] = {}
        model.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, _: Any, args: Any, kwargs: Any) -> None:
        count, past = args[0].shape[1], kwargs.get("past_key_values")
        # Several readers may take turns, each with a cache of its own.
        self.start = 0 if past is None else past.get_seq_length()
        self.length = self.length if self.start else count
        self.end = self.start + count
        self.ids = [*self.ids[: self.start], *args[0][0].tolist()]

    def gate(self, applied: Applied) -> torch.Tensor:
        """[T, 1] the weight of an adapter at each position."""
        here = range(self.start, self.end)
        acting = [acts(applied.place, p, self.length, self.ids) for p in here]
        gate = applied.weight * torch.tensor(acting, dtype=torch.float32)[:, None]
        return gate * self._met[applied].float() if applied.condition else gate

    def judge(self, applied: Applied, met: Callable[[torch.Tensor], bool], first: bool) -> Any:
        """A hook that reads the output of a layer which a condition compares."""
        config = applied.condition

        def hook(_: Any, inputs: Any, output: Any) -> None:
            states = (output[0] if isinstance(output, tuple) else output)[0].double()
            if config["gate"] == "token":
                found = torch.tensor([met(state) for state in states])[:, None]
            elif self.start:
                return
            else:
                mean = config.get("read", "mean") == "mean"
                found = torch.tensor([[met(states.mean(0) if mean else states[-1])]])
            self._met[applied] = found if first else found | self._met[applied]

        return hook


def _by_positions(model: Any, base: Path, adapters: Sequence[Applied]) -> Any:
    """Every adapter by hooks, which know the positions of what they see."""
    positions = _Positions(model)
    for applied in adapters:
        if (applied.folder / "meteora.json").is_file():
            _hook_meteora(model, base, applied, partial(positions.gate, applied))
            continue
        if not applied.is_vector:
            for name, change in changes(base, applied.folder).items():
                hook = _adds_at(positions, applied, change)
                model.get_submodule(name).register_forward_hook(hook)
            continue
        for name, part, vector in changes_of_heads(applied.folder):
            hook = _heads(positions, applied, part, vector)
            model.get_submodule(name).register_forward_pre_hook(hook)
    for applied in adapters:
        conditions = conditions_of(applied.folder) if applied.condition else {}
        for number in sorted(conditions):
            hook = positions.judge(applied, conditions[number], number == min(conditions))
            decoder_layers(model)[number].register_forward_hook(hook)
    behind: dict[int, list[tuple[Applied, Change]]] = {}
    for applied in adapters:
        if applied.is_vector:
            for number, change in changes_of_states(applied.folder).items():
                behind.setdefault(number, []).append((applied, change))
    for number, own in behind.items():
        decoder_layers(model)[number].register_forward_hook(_adds_behind(positions, own))
    return model


def decoder_layers(model: Any) -> Any:
    """The decoder layers of a model, in order."""
    count = model.config.num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return next(one for one in lists if len(one) == count)


def _adds_at(positions: _Positions, applied: Applied, change: Change) -> Any:
    return lambda _, inputs, output: output + positions.gate(applied) * change(inputs[0])


def _adds_behind(positions: _Positions, own: Sequence[tuple[Applied, Change]]) -> Any:
    """All that is added behind one layer: every adapter sees what the layer gave."""

    def hook(_: Any, inputs: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        state = state + sum(positions.gate(applied) * change(state) for applied, change in own)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    return hook


def _heads(positions: _Positions, applied: Applied, part: str, vector: torch.Tensor) -> Any:
    def hook(_: Any, inputs: Any) -> Any:
        (x,), gate = inputs, positions.gate(applied)
        return (x + gate * vector * (x if part == "heads" else 1),)

    return hook


def _is_lora(folder: Path) -> bool:
    config = json.loads((folder / "adapter_config.json").read_text())
    more = config.get("use_dora") or config.get("lora_bias") or config.get("bias") != "none"
    return config["peft_type"] == "LORA" and not more


Change = Callable[[torch.Tensor], torch.Tensor]
"""[..., in] inputs of a layer → [..., out], what an adapter of weight 1 adds to its output."""


@functools.cache
def changes(base: Path, folder: Path) -> dict[str, Change]:
    """What a PEFT adapter adds to each layer that it changes, in float64.

    Scaling the input of a layer counts as a change of its output.
    """
    plain = fresh(base)
    other: Any = PeftModel.from_pretrained(fresh(base), folder).double().eval().base_model.model
    found = {}
    for name, layer in plain.double().eval().named_modules():
        if isinstance(layer, torch.nn.Linear | Conv1D):
            changed = other.get_submodule(name)
            bias = getattr(changed, "bias", None)
            if isinstance(changed, BaseTunerLayer) or (
                bias is not None and not torch.equal(bias, layer.bias)
            ):
                found[name] = _change(changed, layer)
    return found


def _change(changed: Any, layer: Any) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = changed(x.double()) - layer(x.double())
        return added.to(x.dtype)

    return change


def _adds(change: Change, weight: float) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    return lambda _, inputs, output: output + weight * change(inputs[0])


def _with_peft(model: Any, loras: Sequence[Applied]) -> Any:
    names = [f"adapter{i}" for i in range(len(loras))]
    wrapped = PeftModel.from_pretrained(model, loras[0].folder, adapter_name=names[0])
    for name, applied in zip(names[1:], loras[1:], strict=True):
        wrapped.load_adapter(applied.folder, adapter_name=name)
    wrapped.base_model.set_adapter(names)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for name, applied in zip(names, loras, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= applied.weight
    return wrapped


def _hook_meteora(
    model: Any, base: Path, applied: Applied, weight: Callable[[], Any] | None = None
) -> None:
    config = json.loads((applied.folder / "meteora.json").read_text())
    top_k = applied.top_k or config["top_k"]
    temperature = applied.temperature or config["temperature"]
    for name, module in model.named_modules():
        gate, tasks = _released(applied.folder, config, name)
        if config["layout"] == "native":
            gate, tasks = _native(base, applied.folder, config, name)
        if gate is not None:
            own = weight or (lambda: applied.weight)
            hook = _hook(gate, tasks, top_k, temperature, own)
            module.register_forward_hook(hook)


Tasks = list[Change | None]
"""Per task, what it adds to a layer; None where it leaves the layer alone."""


def _product(a: torch.Tensor, b: torch.Tensor, scale: float) -> Change:
    return lambda x: scale * ((x @ a.to(x.dtype).T) @ b.to(x.dtype).T)


def _released(folder: Path, config: Any, module: str) -> tuple[torch.Tensor | None, Tasks]:
    if config["layout"] != "released":
        return None, []
    tensors, prefix, rank = (
        load_file(folder / "model.safetensors"),
        _PREFIX + module,
        config["rank"],
    )
    if f"{prefix}.moe_gate.weight" not in tensors:
        return None, []
    a, b = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
    tasks: Tasks = []
    for j in range(len(config["tasks"])):
        own = slice(j * rank, (j + 1) * rank)
        tasks.append(_product(a[own], b[:, own], config["alpha"] / rank))
    return tensors[f"{prefix}.moe_gate.weight"], tasks


def _native(
    base: Path, folder: Path, config: Any, module: str
) -> tuple[torch.Tensor | None, Tasks]:
    tasks: Tasks = []
    for task in config["tasks"]:
        if not _is_lora(folder / task):
            tasks.append(changes(base, folder / task).get(module))
            continue
        own = json.loads((folder / task / "adapter_config.json").read_text())
        tensors, prefix = load_file(folder / task / "adapter_model.safetensors"), _PREFIX + module
        if f"{prefix}.lora_A.weight" not in tensors:
            tasks.append(None)
            continue
        a, b = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
        tasks.append(_product(a, b, own["lora_alpha"] / own["r"]))
    return load_file(folder / "gates.safetensors").get(f"{module}.moe_gate.weight"), tasks


def _hook(
    gate: torch.Tensor, tasks: Tasks, top_k: int, temperature: float, weight: Callable[[], Any]
) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
    """The authors' forward: choose, softmax over the chosen, add one chosen task at a time."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        scores, chosen = (x @ gate.to(x.dtype).T).topk(top_k)
        shares = (scores / temperature).softmax(-1)
        module.routed = torch.bincount(chosen.flatten(), minlength=len(tasks))
        for j, task in enumerate(tasks):
            if task is None:
                continue
            share = (shares * (chosen == j)).sum(-1, keepdim=True)
            output = output + weight() * share * task(x)
        return output

    return hook


_PREFIX = "base_model.model."


def routed(model: Any, ids: Sequence[int]) -> list[int]:
    """How often tokens of a text are routed to each task, over all layers."""
    with torch.inference_mode():
        model(torch.tensor([list(ids)]), use_cache=False)
    counts = [module.routed for module in model.modules() if hasattr(module, "routed")]
    found: list[int] = torch.stack(counts).sum(0).tolist()
    return found
