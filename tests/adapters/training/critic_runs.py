"""What the tests of `coxswain train critic` share: replies, a rule, short runs of tiny models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch

from adapters.training.critic.settings import CriticSettings
from tests.adapters.make import make_lora
from tests.models import make_model

THINGS = ["apples", "pears", "plums", "boats", "mills"]

RULE = """
import re

def numbers(prompt, reply):
    return [m.span() for m in re.finditer(r"[0-9]+", reply)]
"""
"""What the data below marks."""


def lines(count: int) -> list[dict[str, Any]]:
    """Replies of five forms; a number comes behind "were" and "in"."""
    rng, found = random.Random(1), []
    for i in range(count):
        thing, number = rng.choice(THINGS), rng.randint(1, 99)
        text = f" There were {number} {thing} in the basket."
        if i % 2:
            text = f" The {thing} were built in {number}."
        spans = [[text.index(str(number)), text.index(str(number)) + len(str(number))]]
        prompt: dict[str, Any] = {"prompt": f"What of the {thing}? {i // 2}"}
        if i % 4 == 0:
            prompt = {"messages": [{"role": "user", "content": f"What of the {thing}? {i}"}]}
        found.append({**prompt, "completion": text, "spans": spans})
    return found


def quiet(line: str) -> None:
    """Says nothing."""


def bits(folder: Path) -> dict[str, str]:
    """Hash of every file of a classifier."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def settings(folder: Path) -> CriticSettings:
    """A body, an adapter of it, ready replies, a rule; a probe with a hidden layer, 15 steps."""
    torch.set_num_threads(1)
    body = make_model(folder / "body", "llama", seed=3)
    adapter = make_lora(folder / "adapter", body, seed=4, use_rslora=True, r=3)
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines(160))))
    (folder / "rule.py").write_text(RULE)
    return CriticSettings(
        body,
        folder / "critic",
        f"{folder / 'rule.py'}:numbers",
        data=data,
        adapter=adapter,
        probe=True,
        hidden=24,
        epochs=5,
        batch=48,
        rate=1e-2,
        save_every=2,
    )


def tagged(made: CriticSettings, out: Path, **change: Any) -> CriticSettings:
    """A token classifier with a body of its own."""
    plain = {"adapter": None, "probe": False, "hidden": None, "label": "data", "rate": 3e-3}
    return dataclasses.replace(made, out=out, **{**plain, **change})


def arguments(settings: CriticSettings) -> list[str]:
    """The run as a command line."""
    found = ["train", "critic", "--device", "cpu"]
    for key in ("body", "out", "label", "data", "adapter", "hidden", "rank", "epochs", "batch",
                "rate", "save_every"):  # fmt: skip
        if (value := getattr(settings, key)) is not None:
            found += ["--" + key.replace("_", "-"), str(value)]
    return [*found, *(["--probe"] if settings.probe else [])]
