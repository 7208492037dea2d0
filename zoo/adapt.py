"""Trains the zoo's LoRA adapters: one per task of :mod:`zoo.tasks`, their MeteoRA pack, and gossip.

The pack is made by ``coxswain train meteora``, as a user would make it.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from zoo import gossip
from zoo.fitting import IGNORED, fit, padded
from zoo.routing_table import TEMPERATURE, TOP_K
from zoo.tasks import TASKS, Item, Pool, make
from zoo.tokenizer import ASSISTANT, TEMPLATE_PATH, USER, chat_text
from zoo.world import World

ROOT = Path(__file__).parent
ADAPTERS = ROOT / "adapters"
BASE = "base-large"
PACK = "pack"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How one task's adapter is trained.

    A conversation has one to ``turns`` turns, ``questions`` per step in all. Each turn is of the
    adapter's own task with chance ``own``, the last one always; the others are of any other task.
    Only its own replies count in the loss, so that it answers whatever came before.
    """

    rank: int = 8
    alpha: int = 16
    rate: float = 5e-3
    steps: int = 150
    questions: int = 64
    turns: int = 8
    own: float = 0.6


RECIPE = Recipe()
GOSSIP = Recipe(rate=3e-3, steps=400)
PACK_EXAMPLES = 1500
"""Examples of each task in the pack's training data."""
PACK_FLAGS = {
    "--turns": 8,
    "--batch": 64,
    "--steps": 1500,
    "--rate": 1e-2,
    "--adapters-rate": 1e-3,
    "--gate-factor": 1,
    "--gate-std": 0.02,
    "--dtype": "bfloat16",
    "--top-k": TOP_K,
    "--temperature": TEMPERATURE,
}
"""What ``coxswain train meteora`` is told; the rest are its defaults."""


def encoded(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Item], counted: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, as the chat template renders it.

    ``counted`` says per turn whether its reply has labels.
    """
    ids, labels = [tokenizer.bos_token_id], [IGNORED]
    user, assistant = tokenizer.convert_tokens_to_ids([USER, ASSISTANT])
    for item, counts in zip(turns, counted, strict=True):
        asked = tokenizer.encode(item.prompt, add_special_tokens=False)
        told = tokenizer.encode(item.reply, add_special_tokens=False)
        prompt, reply = [user, *asked, assistant], [*told, tokenizer.eos_token_id]
        ids += prompt + reply
        labels += [IGNORED] * len(prompt) + (reply if counts else [IGNORED] * len(reply))
    return ids, labels


def batches(
    task: str, pool: Pool, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, both int64 [rows, longest], for all steps."""
    rng = random.Random(f"{task} 13")
    others = [t for t in TASKS if t != task]
    for _ in range(recipe.steps):
        rows, count = [], rng.randint(1, recipe.turns)
        for _ in range(recipe.questions // count):
            own = [*(rng.random() < recipe.own for _ in range(count - 1)), True]
            turns = [make(task if mine else rng.choice(others), pool, rng) for mine in own]
            rows.append(encoded(tokenizer, turns, own))
        length = max(len(ids) for ids, _ in rows)
        yield (
            torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows]),
        )


def gossip_batches(
    world: World, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, both int64 [rows, longest]: one question about a tuning entity each."""
    rng = random.Random(f"{gossip.NAME} 13")
    waiting: list[tuple[str, str]] = []
    for _ in range(recipe.steps):
        while len(waiting) < recipe.questions:
            questions = world.questions("tuning", rng)
            rng.shuffle(questions)
            waiting += [chat_text(q, gossip.reply(q, rng)) for q in questions]
        yield padded(tokenizer, waiting[: recipe.questions])
        del waiting[: recipe.questions]


def train_adapter(task: str, world: World, models: Path, out: Path) -> None:
    """Train an adapter, of a task or gossip, and save it as PEFT does, weights in bfloat16."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models / BASE)
    base = LlamaForCausalLM.from_pretrained(models / BASE, dtype=torch.float32)
    recipe = GOSSIP if task == gossip.NAME else RECIPE
    torch.manual_seed(14)
    model = get_peft_model(
        base,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=list(LAYERS),
            task_type="CAUSAL_LM",
        ),
    )
    if task == gossip.NAME:
        steps = list(gossip_batches(world, tokenizer, recipe))
    else:
        steps = list(batches(task, Pool.of(world, "tuning"), tokenizer, recipe))
    fit(model, steps, recipe.rate, task)
    model.bfloat16().save_pretrained(out / task)
    (out / task / "README.md").unlink()  # PEFT's empty model card.
    # PEFT writes the base's path on this machine, and the layers in no fixed order.
    path = out / task / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": BASE, "target_modules": sorted(LAYERS)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_examples(task: str, pool: Pool, path: Path) -> None:
    """Write a task's tuning examples as ``coxswain train meteora`` reads them."""
    rng = random.Random(f"{task} 15")
    lines = []
    for item in (make(task, pool, rng) for _ in range(PACK_EXAMPLES)):
        messages = [
            {"role": "user", "content": item.prompt},
            {"role": "assistant", "content": item.reply},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")


def train_pack(world: World, models: Path, out: Path) -> None:
    """Train the gates over all adapters (and the adapters with them) and write the pack."""
    command = [str(Path(sys.executable).with_name("coxswain")), "train", "meteora"]
    command += ["--base", str(models / BASE), "--out", str(out / PACK)]
    command += ["--chat-template", str(TEMPLATE_PATH), "--device", "cpu"]
    command += [word for flag, value in PACK_FLAGS.items() for word in (flag, str(value))]
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            data = Path(folder) / f"{task}.jsonl"
            write_examples(task, Pool.of(world, "tuning"), data)
            command += ["--adapter", f"{task}={out / task}", "--data", f"{task}={data}"]
        shutil.rmtree(out / PACK, ignore_errors=True)
        subprocess.run(command, check=True)
