"""Trains a value model for value-augmented sampling (arXiv 2405.06639, section 4).

Replies y of the policy as it is served, a reward r for each. V reads a prompt with the reply so
far; s_t is the prompt with the first t of the reply's L ids:

    L = ½ · mean over t = 0 … L of (V(s_t) − G_t)²,    G_L = r
    G_t = γ ((1 − λ) V(s_{t+1}) + λ G_{t+1}),          V(s_L) := r in it, no gradient through G

Where we differ from the authors' code: the last state, behind the id that ends the text, is trained
too (to r), so that V has been taught what an end is worth; and V starts at the mean reward, not 0.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapters.training import checkpoint, server_checks
from adapters.training.data import content_digest
from adapters.training.errors import BadRecipe
from adapters.training.prompts import Prompt, read_prompts
from adapters.training.served import Sample, sample
from adapters.training.value.fit import Explained, Row, fit
from adapters.training.value.model import ValueModel
from adapters.training.value.rewards import opened, rewards
from adapters.training.value.settings import ValueSettings

SAMPLES, REWARDS = "samples.jsonl", "rewards.jsonl"
"""Files of the work folder. They stay there when the run is complete."""


def train(settings: ValueSettings, say: Callable[[str], None] = print) -> Explained:
    """Runs or resumes a training run to its end and writes the value model.

    Args:
        settings: the run.
        say: takes lines for a person.

    Returns:
        How well it does on held-out prompts.

    Raises:
        AdapterError: something given cannot be used, or the server or the reward fails.
    """
    settings.check()
    prompts = read_prompts(settings.prompts)
    server_checks.check_body(settings.body)
    folder = checkpoint.work_folder(settings.out)
    with checkpoint.locked(folder):
        before = checkpoint.last_run(folder)
        checkpoint.check_free(settings.out, before)
        if before is not None:
            _check_settings(before, settings, folder)
        samples, given = _collected(settings, prompts, folder)
        run = _identity(settings, samples, given)
        if before is not None:
            checkpoint.check_same(before, run, folder / "step-*")
        if not settings.out.exists():
            _fit(settings, samples, given, run, folder, say)
        for path in (*folder.glob("step-*"), folder / "checkpoint.part"):
            shutil.rmtree(path, ignore_errors=True)
    found: Explained = json.loads((settings.out / "training.json").read_bytes())["explained"]
    return found


def _check_settings(before: dict[str, Any], settings: ValueSettings, folder: Path) -> None:
    checkpoint.check_same(before, {"settings": settings.deciding()}, folder / "step-*")


def _collected(
    settings: ValueSettings, prompts: Sequence[Prompt], folder: Path
) -> tuple[list[Sample], list[float]]:
    """Samples and rewards; server and reward are asked only for what is missing."""

    def sampled() -> list[Sample]:
        found = sample(
            settings.served,
            prompts,
            per_prompt=settings.samples,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            file=folder / SAMPLES,
            progress="samples",
        )
        server_checks.check_samples(settings.body, prompts, found)
        return found

    name, file = settings.reward, folder / REWARDS
    if _lines(file) == len(prompts) * settings.samples:
        samples = sampled()
        return samples, rewards(None, name, prompts, samples, file)
    with opened(name, settings.reward_timeout_s, settings.device) as reward:
        if _lines(folder / SAMPLES) < len(prompts):
            server_checks.check_server(settings.served, prompts, settings.body)
        samples = sampled()
        return samples, rewards(reward, name, prompts, samples, file)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _identity(
    settings: ValueSettings, samples: Sequence[Sample], given: Sequence[float]
) -> dict[str, Any]:
    """What two runs must share to be one; JSON values."""
    data = json.dumps([[s.prompt, s.reply, r] for s, r in zip(samples, given, strict=True)])
    return {
        "settings": settings.deciding(),
        "body": content_digest(settings.body / "config.json"),
        "samples and rewards": hashlib.sha256(data.encode()).hexdigest(),
    }


def _fit(
    settings: ValueSettings,
    samples: Sequence[Sample],
    given: Sequence[float],
    run: dict[str, Any],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    if min(given) == max(given):
        raise BadRecipe(
            "all rewards are the same, so there is nothing to learn",
            field=f"--reward {settings.reward}",
            value=given[0],
        )
    rows, held = _split(settings, samples, given)
    mean = sum(row.reward for row in rows) / len(rows)
    say(f"{len(rows)} replies, rewards {min(given):g} to {max(given):g}, {mean:.4g} in the mean")
    model = ValueModel(
        settings.body,
        rank=settings.rank,
        alpha=settings.alpha or 2.0 * (settings.rank or 0),
        mean=mean,
        seed=settings.seed,
        device=settings.device,
        dtype=settings.dtype,
    )
    explained = fit(settings, model, rows, held, run, folder, say)
    part = folder / "model"
    model.write(part)
    report = {"recipe": "value", **run, "rewards": {"mean": mean}, "explained": explained}
    (part / "training.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    checkpoint.publish(part, settings.out)


def _split(
    settings: ValueSettings, samples: Sequence[Sample], given: Sequence[float]
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out; all replies to a prompt are on one side."""
    prompts = sorted({sample.prompt for sample in samples})
    if settings.held_out and len(prompts) == 1:
        raise BadRecipe(
            "there is one prompt only",
            field="--held-out",
            value=settings.held_out,
            allowed="0, or more prompts",
        )
    count = min(max(1, round(settings.held_out * len(prompts))), len(prompts) - 1)
    draw = random.Random(f"{settings.seed} held out")
    held = set(draw.sample(prompts, count if settings.held_out else 0))
    found: tuple[list[Row], list[Row]] = ([], [])
    for one, reward in zip(samples, given, strict=True):
        row = Row([*one.prompt, *one.reply], len(one.prompt) - 1, reward)
        found[one.prompt in held].append(row)
    return found
