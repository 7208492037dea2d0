"""A slow stand-in for the server's adapters: PEFT for one adapter, plain hooks for the pack.

``python -m zoo.adapted`` holds the validation conversations without a server.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from zoo.adapt import ADAPTERS, BASE, PACK
from zoo.conversations import MAX_TOKENS, Asked, hold, path_of, read_conversations
from zoo.reference import Stream, generate
from zoo.routing_table import BASE as ALONE
from zoo.routing_table import BY_HAND, SETTINGS, Setting, markdown, pack
from zoo.table import Reply
from zoo.tokenizer import with_chat

ROOT = Path(__file__).parent
BATCH = 160


class Adapted:
    """The base with its adapters, loaded when they are first asked for."""

    def __init__(self, models: Path, adapters: Path, dtype: torch.dtype) -> None:
        self.folder = adapters
        self.load = lambda: LlamaForCausalLM.from_pretrained(models / BASE, dtype=dtype).eval()
        self.tokenizer = with_chat(PreTrainedTokenizerFast.from_pretrained(models / BASE))
        self.models: dict[str, Any] = {}

    def answer(self, setting: Setting, asked: Sequence[Asked]) -> list[Reply]:
        """The replies, in order; greedy."""
        found: dict[int, Reply] = {}
        names = [self._name(setting, one) for one in asked]
        for name in sorted(set(names)):
            own = [i for i, other in enumerate(names) if other == name]
            for at in range(0, len(own), BATCH):
                part = own[at : at + BATCH]
                replies = self._generate(self._model(name), [asked[i] for i in part])
                found.update(zip(part, replies, strict=True))
        return [found[i] for i in range(len(asked))]

    def _name(self, setting: Setting, asked: Asked) -> str:
        if setting.adapters:
            return json.dumps(setting.adapters[0])
        return asked.task if setting.by_hand else ""

    def _model(self, name: str) -> Any:
        if name not in self.models:
            model = self.load()
            if name.startswith("{"):
                fields = json.loads(name)
                route(model, self.folder / PACK, fields["top_k"], fields["temperature"])
            elif name:
                model = PeftModel.from_pretrained(model, self.folder / name).eval()
            self.models[name] = model
        return self.models[name]

    def _generate(self, model: Any, asked: Sequence[Asked]) -> list[Reply]:
        prompts = [
            self.tokenizer.encode(
                self.tokenizer.apply_chat_template(
                    one.messages, add_generation_prompt=True, tokenize=False
                ),
                add_special_tokens=False,
            )
            for one in asked
        ]
        end = self.tokenizer.eos_token_id
        told = generate([Stream(model, 1.0, prompts)], (end,), 0, MAX_TOKENS, 0.0)
        return [
            Reply(self.tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == end)
            for ids in told
        ]


def route(model: LlamaForCausalLM, folder: Path, top_k: int, temperature: float) -> None:
    """Add a native MeteoRA pack to a model by hooks, one adapter at a time as the authors do."""
    tasks = json.loads((folder / "meteora.json").read_text())["tasks"]
    gates = load_file(folder / "gates.safetensors")
    files = [load_file(folder / task / "adapter_model.safetensors") for task in tasks]
    configs = [json.loads((folder / task / "adapter_config.json").read_text()) for task in tasks]
    scales = [config["lora_alpha"] / config["r"] for config in configs]
    for name, module in model.named_modules():
        gate = gates.get(f"{name}.moe_gate.weight")
        if gate is not None:
            key = f"base_model.model.{name}.lora_"
            halves = [(f[f"{key}A.weight"], f[f"{key}B.weight"]) for f in files]
            module.register_forward_hook(
                _hook(gate.to(model.dtype), halves, scales, top_k, temperature)
            )


def _hook(
    gate: Tensor,
    halves: list[tuple[Tensor, Tensor]],
    scales: list[float],
    top_k: int,
    temperature: float,
) -> Callable[[Any, Any, Tensor], Tensor]:
    """``y + Σ_j g_j s_j B_j A_j x`` with g the softmax of the k highest scores over T."""

    def hook(module: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        (x,) = inputs
        scores, chosen = (x @ gate.T).float().topk(top_k)
        shares = (scores / temperature).softmax(-1)
        for j, ((a, b), scale) in enumerate(zip(halves, scales, strict=True)):
            share = (shares * (chosen == j)).sum(-1, keepdim=True) * scale
            y = y + ((x @ a.to(x.dtype).T) * share.to(x.dtype)) @ b.to(x.dtype).T
        return y

    return hook


def main() -> None:
    """Parse the arguments, hold the conversations, print."""
    parser = argparse.ArgumentParser(prog="python -m zoo.adapted", description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--top-k", type=int, nargs="*", default=[], help="try the pack with these k"
    )
    parser.add_argument("--temperature", type=float, nargs="*", default=[], help="and these T")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tried = tuple(pack(k, t) for k in args.top_k for t in args.temperature)
    settings = (ALONE, BY_HAND, *tried) if tried else SETTINGS
    adapted = Adapted(args.models, args.adapters, getattr(torch, args.dtype))
    conversations = read_conversations(path_of(args.split))
    results = []
    for setting in settings:
        results.append((setting, hold(conversations, lambda a, s=setting: adapted.answer(s, a))))  # type: ignore[misc]
    print(markdown(conversations, results))


if __name__ == "__main__":
    main()
