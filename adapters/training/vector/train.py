"""Trains a steering vector: from pairs, or from the best and worst replies by a reward.

    v_l = mean over pairs of (h_l⁺ − h_l⁻), or the first principal component of the differences

h_l is the output of decoder layer l. CAA (arXiv 2312.06681) takes means; repeng the component.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from adapters.training import checkpoint, server_checks
from adapters.training.data import content_digest
from adapters.training.errors import BadRecipe
from adapters.training.prompts import Prompt, read_prompts
from adapters.training.served import sample
from adapters.training.value.rewards import Reward, opened, rewards
from adapters.training.vector.contrast import (
    Pair,
    directions,
    extremes,
    read_pairs,
    read_states,
    separation,
)
from adapters.training.vector.settings import VectorSettings
from adapters.training.vector.trials import Trial, try_all, write_vector

_T = TypeVar("_T")

Chosen = dict[str, Any]
"""What the report of a run holds: layer, weight, the separation of each layer, the trials."""


def train(settings: VectorSettings, say: Callable[[str], None] = print) -> Chosen:
    """Runs or resumes a run to its end and writes the vector with its card.

    Args:
        settings: the run.
        say: takes lines for a person.

    Returns:
        What was chosen, and why.

    Raises:
        AdapterError: something given cannot be used, or the server or the reward fails.
    """
    settings.check()
    server_checks.check_body(settings.body)
    prompts = read_prompts(settings.prompts) if settings.prompts else []
    folder = checkpoint.work_folder(settings.out)
    with checkpoint.locked(folder):
        checkpoint.check_free(settings.out, None)
        run = _identity(settings)
        _same(run, folder)
        if settings.reward is None:
            chosen = _work(settings, prompts, None, folder, say)
        else:
            with opened(settings.reward, settings.reward_timeout_s, settings.device) as reward:
                server_checks.check_server(settings.served, prompts, settings.body)
                chosen = _work(settings, prompts, reward, folder, say)
        _write(settings, run, chosen, folder)
    return {key: value for key, value in chosen.items() if key != "vector"}


def _identity(settings: VectorSettings) -> dict[str, Any]:
    """What two runs must share to be one; JSON values."""
    files = {name: content_digest(path) for name in ("pairs", "prompts")
             if (path := getattr(settings, name)) is not None}  # fmt: skip
    body = content_digest(settings.body / "config.json")
    return {"settings": settings.deciding(), "body": body, "reward": settings.reward, **files}


def _same(run: dict[str, Any], folder: Path) -> None:
    file = folder / "run.json"
    if file.exists():
        checkpoint.check_same(json.loads(file.read_bytes()), run, folder)
    else:
        file.with_suffix(".part").write_text(json.dumps(run, indent=1))
        file.with_suffix(".part").rename(file)


def _work(
    settings: VectorSettings, prompts: Sequence[Prompt], reward: Reward | None, folder: Path,
    say: Callable[[str], None],
) -> Chosen:  # fmt: skip
    kept, held_prompts = _split(settings, prompts, "prompts") if prompts else ([], [])
    if settings.pairs is not None:
        pairs = read_pairs(settings.pairs, settings.body)
    else:
        assert reward is not None
        pairs = _sampled(settings, kept, reward, folder)
    fitted, held = _split(settings, pairs, "pairs")
    say(f"{len(fitted)} pairs to learn from, {len(held)} to choose by")
    states = _states(settings, [*fitted, *held], folder)
    found = directions(states[: len(fitted)], settings.direction)
    apart = separation(states[len(fitted) :], found)
    order = sorted(range(len(apart)), key=lambda n: apart[n], reverse=True)
    trials: list[Trial] = []
    layer, weight = order[0], 1.0
    if reward is not None:
        vectors = {n: found[n] for n in order[: settings.tried]}
        trials = try_all(settings, held_prompts, vectors, reward, folder)
        best = max(trials[1:], key=lambda t: t.reward)
        assert best.layer is not None
        layer, weight = best.layer, best.weight
        if best.reward <= trials[0].reward:
            say("no vector raises the reward of the held-out prompts: the best of them is written")
    rewards = [{"layer": t.layer, "weight": t.weight, "reward": t.reward} for t in trials]
    return {"layer": layer, "weight": weight, "norm": float(found[layer].norm()),
            "pairs": [len(fitted), len(held)], "separation": apart, "trials": rewards,
            "vector": found[layer]}  # fmt: skip


def _sampled(
    settings: VectorSettings, prompts: Sequence[Prompt], reward: Reward, folder: Path
) -> list[Pair]:
    samples = sample(
        settings.served,
        prompts,
        per_prompt=settings.samples,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        file=folder / "samples.jsonl",
        progress="samples",
    )
    server_checks.check_samples(settings.body, prompts, samples)
    assert settings.reward is not None
    given = rewards(reward, settings.reward, prompts, samples, folder / "rewards.jsonl")
    return extremes(samples, given, settings.samples)


def _split(
    settings: VectorSettings, whole: Sequence[_T], what: str
) -> tuple[list[_T], list[_T]]:  # fmt: skip
    """To learn from, and held out."""
    if len(whole) < 2:
        raise BadRecipe(
            f"too few {what} to learn from some and choose by others",
            field=what,
            value=len(whole),
            allowed="2 or more; of replies, with rewards that differ",
        )
    count = min(max(1, round(settings.held_out * len(whole))), len(whole) - 1)
    held = set(random.Random(f"{settings.seed} {what}").sample(range(len(whole)), count))
    return ([one for i, one in enumerate(whole) if i not in held],
            [one for i, one in enumerate(whole) if i in held])  # fmt: skip


def _states(settings: VectorSettings, pairs: Sequence[Pair], folder: Path) -> torch.Tensor:
    """Computed once; a resumed run reads them."""
    ids = json.dumps([[[t.ids, t.start] for t in pair] for pair in pairs])
    file = folder / f"states-{hashlib.sha256(ids.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        found = read_states(settings.body, pairs, which=settings.states, device=settings.device,
                            dtype=settings.dtype)  # fmt: skip
        save_file({"states": found}, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    return load_file(file)["states"]


def _write(settings: VectorSettings, run: dict[str, Any], chosen: Chosen, folder: Path) -> None:
    part = folder / "vector"
    shutil.rmtree(part, ignore_errors=True)
    write_vector(part, chosen["layer"], chosen["vector"], chosen["weight"])
    report = {key: value for key, value in chosen.items() if key != "vector"}
    (part / "training.json").write_text(
        json.dumps({"recipe": "vector", **run, **report}, indent=1, ensure_ascii=False) + "\n"
    )
    (part / "README.md").write_text(_card(settings, chosen))
    checkpoint.publish(part, settings.out)


def _card(settings: VectorSettings, chosen: Chosen) -> str:
    """Where it comes from, for people who find the folder."""
    data = settings.pairs or f"best and worst of {settings.samples} replies to {settings.prompts}"
    how = "mean of the differences" if settings.direction == "mean" else (
        "first principal component of the differences")  # fmt: skip
    lines = [
        f"# {settings.out.name}: a steering vector", "",
        f"- Base: `{settings.body}`", f"- Data: {data}",
        f"- Pairs: {chosen['pairs'][0]} to learn from, {chosen['pairs'][1]} held out",
        f"- Direction: {how}, states: {settings.states} token"
        + ("s of the reply" if settings.states == "mean" else ""),
        (f"- Added behind decoder layer {chosen['layer']} (counted from 0), of length "
         f"{chosen['norm']:.4g}; a request's weight 1 is {chosen['weight']:g} times it"), "",
        "| layer | held-out pairs told apart | difference / standard deviation |", "|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {n} | {r:.1%} | {a:.3f} |" for n, (r, a) in enumerate(chosen["separation"])]
    if chosen["trials"]:
        lines += ["", f"Mean of the reward `{settings.reward}` over replies to held-out prompts:",
                  "", "| layer | weight | reward |", "|---|---|---|"]  # fmt: skip
        lines += [f"| {'none' if t['layer'] is None else t['layer']} | {t['weight']:g} | "
                  f"{t['reward']:.4g} |" for t in chosen["trials"]]  # fmt: skip
    return "\n".join(lines) + "\n"
