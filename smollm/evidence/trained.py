"""Makes the adapters of `dial` and `adapters`: the base's answers, LoRAs with PEFT, the pack.

What a folder has already is used again.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.training import checkpoint
from adapters.training.data import IGNORED, Encoder, Example, Tokens
from adapters.training.descent import Descent
from smollm.evidence.purposes import PLAINLY, Item, Purpose, Split, first_sentences, splits
from smollm.evidence.work import Work

RANK, ALPHA = 8, 16
FIRST_LAYER = 15
"""Layers below stay as they are. So the gates of a pack read what has attended to the prompt."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
LONGEST = 512
BATCH, RATE, EPOCHS = 4, 3e-3, 1.0
ADAPTERS, PACK = "adapters", "pack"
"""The claims' common folder, and the pack's in it."""


def answered(model: Path, purpose: Purpose, items: Sequence[Item], file: Path) -> list[Item]:
    """Items with an answer: their own, or the base's short one, written down in a file.

    Items for which the base finds no short sentence are left out.
    """
    if all(item.answer for item in items):
        return list(items)
    if not file.is_file():
        found = _generated(model, [item.question for item in items])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n", "utf-8")
    texts = json.loads(file.read_text("utf-8"))
    usable = [(item, first_sentences(text)) for item, text in zip(items, texts, strict=True)]
    return [replace(item, answer=text) for item, text in usable if text]


@torch.inference_mode()
def _generated(folder: Path, questions: Sequence[str], at_once: int = 48) -> list[str]:
    """The base's greedy replies."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[str] = []
    for start in range(0, len(questions), at_once):
        asked = [
            [{"role": "user", "content": f"{question} {PLAINLY}"}]
            for question in questions[start : start + at_once]
        ]
        rows = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**rows, max_new_tokens=40, do_sample=False)
        width = rows["input_ids"].shape[1]
        found += tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return found


def example_lines(purpose: Purpose, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Lines of a JSONL file that a recipe reads: each item with the reply to learn."""
    return [
        {
            "messages": [
                {"role": "user", "content": item.question},
                {"role": "assistant", "content": purpose.form(item)},
            ]
        }
        for item in items
    ]


def train_lora(
    model: Path,
    lines: Sequence[dict[str, Any]],
    out: Path,
    *,
    epochs: float = EPOCHS,
    seed: int = 0,
    first_layer: int = FIRST_LAYER,
) -> None:
    """Trains a LoRA adapter with PEFT on conversations, and writes its folder.

    The loss is the mean cross-entropy of the replies' tokens; only their positions are read out.

    Args:
        model: folder of the base.
        lines: as `example_lines` makes them.
        out: the adapter's folder; what is there is kept, and nothing is trained.
        epochs: passes over the lines, > 0.
        seed: of the adapter's start and the order of the lines.
        first_layer: those below are not adapted.
    """
    if out.exists():
        return
    torch.manual_seed(seed)
    rows = encoded(model, lines)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = list(range(first_layer, base.config.num_hidden_layers))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS),
                        layers_to_transform=layers, task_type="CAUSAL_LM")  # fmt: skip
    tuned = get_peft_model(base, config)
    steps = max(1, round(epochs * len(rows) / BATCH))
    parameters = {n: p for n, p in tuned.named_parameters() if p.requires_grad}

    def losses(start: int) -> Iterator[tuple[float, str]]:
        for step in range(start, steps):
            loss = reply_loss(base, _batch(rows, step, seed))
            loss.backward()  # type: ignore[no-untyped-call]
            value = float(loss.detach())
            yield value, f"loss {value:.3f}"

    work = checkpoint.work_folder(out)
    with checkpoint.locked(work):
        Descent(
            out.name, parameters, [(list(parameters.values()), RATE)], steps, 0.1, 0.0, steps
        ).run({}, work, print, losses)
        tuned.save_pretrained(str(work / "adapter"))
        (work / "adapter").rename(out)
        shutil.rmtree(work)


def encoded(model: Path, lines: Sequence[dict[str, Any]]) -> list[Tokens]:
    """The tokens of conversations; labels are those of the replies."""
    encoder = Encoder(AutoTokenizer.from_pretrained(model), None, LONGEST)
    return [
        encoder.row([(0, Example(str(i), messages=tuple(line["messages"])))])
        for i, line in enumerate(lines)
    ]


def _batch(rows: Sequence[Tokens], step: int, seed: int) -> list[Tokens]:
    """The rows of a step: every row once before any row comes again."""
    found = []
    for place in range(step * BATCH, (step + 1) * BATCH):
        epoch, at = divmod(place, len(rows))
        order = list(range(len(rows)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        found.append(rows[order[at]])
    return found


def reply_loss(base: Any, rows: Sequence[Tokens]) -> torch.Tensor:
    """The mean over the tokens that have labels; rows are padded on the right."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    labels = torch.tensor([row.labels + [IGNORED] * (width - len(row.labels)) for row in rows])
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    counts = wanted != IGNORED
    return cross_entropy(base.lm_head(hidden[counts]), wanted[counts])


def train_pack(model: Path, purposes: Sequence[Purpose], folder: Path, steps: int) -> None:
    """Trains the gates over a folder's adapters by `coxswain train meteora`, from `made`'s lines.

    Raises:
        subprocess.CalledProcessError: the command failed; it has said why.
    """
    out = folder / PACK
    if not out.exists():
        program = str(Path(sys.executable).with_name("coxswain"))
        command = [program, "train", "meteora", "--base", str(model), "--out", str(out)]
        for purpose in purposes:
            command += ["--adapter", f"{purpose.name}={folder / purpose.name}"]
            command += ["--data", f"{purpose.name}={_lines(folder, purpose)}"]
        options = {"top-k": 1, "gate-std": 0.02, "rate": 1e-2, "gate-factor": 1, "batch": 4,
                   "steps": steps, "save-every": steps, "warm-up": 0.1}  # fmt: skip
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True)


def _lines(folder: Path, purpose: Purpose) -> Path:
    return folder / f"{purpose.name}.jsonl"


def _write(lines: Sequence[dict[str, Any]], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


def made(work: Work, purposes: Sequence[Purpose]) -> tuple[Path, dict[str, Split]]:
    """Trains what is not there yet of the purposes' adapters.

    Returns:
        The folder with a PEFT folder for each purpose, and their items; those to train on have
        answers.
    """
    folder = work.folder.parent / ADAPTERS
    found = splits(work.seed)
    for purpose in purposes:
        split = found[purpose.name]
        known = answered(work.model, purpose, split.train, folder / f"{purpose.name}-answers.json")
        found[purpose.name] = replace(split, train=tuple(known))
        lines = example_lines(purpose, known)
        _write(lines, _lines(folder, purpose))
        train_lora(work.model, lines, folder / purpose.name, seed=work.seed)
    return folder, found
