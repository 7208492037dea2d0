"""How far the server's log-probabilities are from PEFT's, on the real model in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.formats import meteora
from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from adapters.training.meteora.routed import install
from smollm.evidence.asking import TEXT, ask

TOKENS, TOP = 16, 5
"""Of a greedy reply, and the most probable ones at each of its places."""

Answer = tuple[list[int], list[int], list[dict[int, float]]]
"""A prompt's ids, the reply's, and log-probabilities at each place of the reply."""


def answers(
    url: str, model: Path, questions: Sequence[str], adapters: Sequence[Mapping[str, Any]]
) -> list[Answer]:
    """The server's greedy replies and their log-probabilities.

    Args:
        url: of the server.
        model: folder of the base, for its tokenizer.
        questions: asked in the chat format, all at once.
        adapters: of each request.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in questions
    ]
    options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": TOP,
               "return_token_ids": True, "return_tokens_as_token_ids": True,
               "adapters": list(adapters)}  # fmt: skip
    found = []
    for prompt, answer in zip(
        prompts, ask(url, TEXT, [{"prompt": p, **options} for p in prompts]), strict=True
    ):
        choice = answer["choices"][0]
        places = [
            {int(token.removeprefix("token_id:")): value for token, value in place.items()}
            for place in choice["logprobs"]["top_logprobs"]
        ]
        found.append((list(prompt), list(choice["token_ids"]), places))
    return found


def error(model: Any, found: Sequence[Answer]) -> float:
    """The largest difference between told log-probabilities and those of a model, in nats.

    Args:
        model: as of transformers, in float32.
        found: from `answers`.
    """
    worst = 0.0
    for prompt, reply, places in found:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0]
        own = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        for row, place in zip(own, places, strict=True):
            worst = max(worst, *(abs(float(row[t]) - value) for t, value in place.items()))
    return worst


def base_model(model: Path) -> Any:
    """The base in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def peft_model(model: Path, weights: Mapping[Path, float]) -> Any:
    """The base with PEFT adapters, each at a weight; the ranks of several are concatenated."""
    first, *others = weights
    tuned = PeftModel.from_pretrained(base_model(model), str(first), adapter_name=first.name)
    for folder in others:
        tuned.load_adapter(str(folder), adapter_name=folder.name)
    names, numbers = [folder.name for folder in weights], list(weights.values())
    if numbers != [1.0]:
        tuned.add_weighted_adapter(names, numbers, "mix", combination_type="cat")
        tuned.set_adapter("mix")
    return tuned.eval()


def routed_model(model: Path, pack: Path) -> Any:
    """The base with a pack as its training computes it, at T = 1 and the pack's own k."""
    config = json.loads((pack / meteora.CONFIG).read_text("utf-8"))
    base, shapes = base_model(model), base_shapes(model)
    members = [inspect(pack / task, shapes, max_rank=1 << 20) for task in config["tasks"]]
    layers = install(base, members, config["top_k"], 1.0, 0)
    gates = load_file(pack / meteora.GATES)
    for name, layer in layers.items():
        layer.gate.data.copy_(gates[f"{name}.moe_gate.weight"])
    return base


References = Mapping[str, tuple[Sequence[Mapping[str, Any]], Callable[[], Any]]]
"""What requests say and the model that it is compared with, by a name for tables."""


def errors(url: str, model: Path, questions: Sequence[str], of: References) -> dict[str, float]:
    """The largest error of each of several ways to use adapters."""
    return {
        name: error(reference(), answers(url, model, questions, adapters))
        for name, (adapters, reference) in of.items()
    }
