"""What the claim `reward` trains with the project's own commands: a value model and a vector.

Both learn from one set of replies that the served model drew to the training requests. What a
folder has already is used again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from smollm.evidence import vader
from smollm.evidence.sunny import Requests, plain
from smollm.evidence.work import Work

LAYERS = 3
"""Of the base's layers that the value model begins as: few, as it reads many candidates."""
TOKENS = 40
"""Of the longest reply."""
SAMPLES, EPOCHS = 6, 2
"""Replies for each training request; times that the value model reads them."""
PAIRS = 64
"""Those whose rewards differ most."""
TRIED_REQUESTS = 32
"""A quarter of them choose the vector's layer and weight."""
ENGINE = {"enforce_eager": True, "max_num_seqs": 64}
"""Of the servers: two cores gain little from compilation."""
REWARD = f"{Path(vader.__file__).resolve()}:compound"


@dataclass(frozen=True)
class Made:
    """Folders.

    Args:
        folder: where all lies.
    """

    folder: Path

    @property
    def body(self) -> Path:
        """The base's first layers."""
        return self.folder / "body"

    @property
    def value(self) -> Path:
        """The value model."""
        return self.folder / "value"

    @property
    def sunny(self) -> Path:
        """The steering vector."""
        return self.folder / "sunny"

    @property
    def adapters(self) -> dict[str, Any]:
        """The server's section that serves the vector and lets the training try others."""
        return {"roots": [str(self.folder)], "vectors": True, "max_loaded": 4, "max_rank": 8}


def with_value(work: Work, requests: Requests) -> Made:
    """The folders of a run; the value model is trained if it is missing.

    Raises:
        subprocess.CalledProcessError: the command failed; it has said why.
    """
    # What a quick run makes is of no use to another one.
    found = Made((work.folder / ("quick" if work.quick else "")).resolve())
    if found.value.is_dir():
        return found
    found.folder.mkdir(parents=True, exist_ok=True)
    if not found.body.is_dir():
        first_layers(work.model, found.body, LAYERS)
    prompts = _written(
        found.folder / "prompts.jsonl", ({"messages": plain(r)} for r in _train(work, requests))
    )
    with work.server({"engine": ENGINE}) as url:
        _coxswain(
            "train", "value", "--server", url, "--prompts", prompts, "--reward", REWARD,
            "--body", found.body, "--out", found.value, "--samples", SAMPLES,
            "--max-tokens", TOKENS, "--epochs", EPOCHS, "--batch", 16, "--rate", 3e-4,
            "--seed", work.seed,
        )  # fmt: skip
    return found


def with_vector(found: Made, work: Work, requests: Requests, url: str) -> None:
    """Trains the vector if it is missing, and loads it into a server.

    Raises:
        subprocess.CalledProcessError: a command failed; it has said why.
    """
    if not found.sunny.is_dir():
        _train_vector(found, url, work, _train(work, requests))
    _coxswain("adapters", "load", "sunny", found.sunny, "--url", url)


def first_layers(model: Path, out: Path, count: int) -> None:
    """Writes a smaller model: the embedding, the first layers and the last norm of another.

    Args:
        model: folder of a Llama with tied embeddings, in one file.
        out: folder to make.
        count: layers that are kept.
    """
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(model, part, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] = count
    (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    with safe_open(model / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if _layer(name) < count}  # noqa: SIM118
    save_file(kept, part / "model.safetensors", metadata={"format": "pt"})
    part.rename(out)


def _layer(name: str) -> int:
    """Of a tensor; −1 if it is in none."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def _train(work: Work, requests: Requests) -> Sequence[str]:
    return requests.train[: work.few(len(requests.train))]


def _train_vector(found: Made, url: str, work: Work, requests: Sequence[str]) -> None:
    """From the best and the worst of the value model's replies to each request."""
    samples = found.value.with_name("value.training") / "samples.jsonl"
    lines = map(json.loads, samples.read_text("utf-8").splitlines())
    replies = {line["index"]: [reply["text"] for reply in line["replies"]] for line in lines}
    pairs = _written(found.folder / "pairs.jsonl", _pairs(requests, replies)[:PAIRS])
    tried = [{"messages": plain(r)} for r in requests[: work.few(TRIED_REQUESTS)]]
    prompts = _written(found.folder / "tried.jsonl", tried)
    _coxswain(
        "train", "vector", "--server", url, "--body", work.model.resolve(), "--pairs", pairs,
        "--prompts", prompts, "--reward", REWARD, "--out", found.sunny,
        "--samples", 3, "--max-tokens", TOKENS, "--states", "mean", "--weights", "1,2,4",
        "--tried", 2, "--seed", work.seed,
    )  # fmt: skip


def _pairs(requests: Sequence[str], replies: dict[int, list[str]]) -> list[dict[str, Any]]:
    """Of each request the best and the worst reply, those first that are furthest apart."""
    found = []
    for index, request in enumerate(requests):
        scored = sorted((vader.compound(None, text), text) for text in replies[index] if text)
        (worst, low), (best, high) = scored[0], scored[-1]
        if worst < best:
            pair = {"messages": plain(request), "positive": high, "negative": low}
            found.append((best - worst, index, pair))
    return [pair for *_, pair in sorted(found, key=lambda one: one[:2], reverse=True)]


def _written(file: Path, lines: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), "utf-8")
    return file


def _coxswain(*arguments: object) -> None:
    program = Path(sys.executable).with_name("coxswain")
    subprocess.run([str(program), *map(str, arguments)], check=True)
