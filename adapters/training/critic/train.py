"""Trains a classifier that says, before a token is drawn, whether it will be critical.

For collaborative decoding (arXiv 2402.17982; `steering.methods.critical_tokens`). The replies are
the aligned model's, as it is served. The loss is, over the states s_t in which
the reply's token t is drawn, f the classifier and y_t whether token t is critical:

    L = − mean over t of w y_t log σ(f(s_t)) + (1 − y_t) log(1 − σ(f(s_t)))

The authors have published no code and no data; what is critical is up to the labelling rule.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
)

from adapters.errors import AdapterError
from adapters.formats.artefact import Artefact
from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from adapters.training import checkpoint
from adapters.training.critic.classifiers import Classifier, Probe, Row, Tagger, features, load_body
from adapters.training.critic.fit import fit
from adapters.training.critic.labels import Labeller
from adapters.training.critic.measures import measures
from adapters.training.critic.replies import Reply, check_length, ready, row, sampled
from adapters.training.critic.settings import CriticSettings
from adapters.training.data import content_digest
from adapters.training.errors import BadRecipe
from adapters.training.meteora.train import NO_LIMIT
from adapters.training.prompts import Prompt, read_prompts
from adapters.training.served import sample
from adapters.training.server_checks import check_body, check_server

REPORT = "critic.json"
"""In the classifier's folder: how it was trained, and what it reaches on the held-out prompts."""

SAMPLES, LABELS = "samples.jsonl", "labels.jsonl"
"""Files of the work folder. They stay there when the run is complete."""


def train(
    settings: CriticSettings, template: str | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs or resumes a training run to its end and writes the classifier.

    Args:
        settings: the run.
        template: chat template of ready replies; None: the body's own.
        say: takes lines for a person.

    Returns:
        What `REPORT` holds; `held_out` are `adapters.training.critic.measures`, None without any.

    Raises:
        AdapterError: a setting, a line of data, the server or the rule cannot be used.
    """
    settings.check()
    run = _Run(settings, template, say)
    folder = checkpoint.work_folder(settings.out)
    with checkpoint.locked(folder):
        before = checkpoint.last_run(folder)
        checkpoint.check_free(settings.out, before)
        if before is not None:
            checkpoint.check_same(before, {"settings": settings.deciding()}, folder / "step-*")
        if not settings.out.exists():
            run.work(folder, before)
        _clean(folder)  # Also what a kill after the last rename left.
    found: dict[str, Any] = json.loads((settings.out / REPORT).read_bytes())
    return found


def _clean(folder: Path) -> None:
    """Leaves the samples and the labels."""
    for path in (*folder.glob("step-*"), folder / "checkpoint.part"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("states-*"):
        path.unlink()


class _Run:
    """One run: everything that can be checked is checked when it is made."""

    def __init__(
        self, settings: CriticSettings, template: str | None, say: Callable[[str], None]
    ) -> None:
        self.settings, self.say = settings, say
        self.adapter = _check_body(settings)
        self.config = AutoConfig.from_pretrained(settings.body)
        self.tokenizer = AutoTokenizer.from_pretrained(settings.body)
        self.labeller = Labeller(settings.label, settings.label_timeout_s)
        self.prompts: list[Prompt] = []
        self.ready: list[Reply] = []
        if settings.data is not None:
            needed = settings.label == "data"
            self.ready = ready(settings.data, self.tokenizer, template, spans=needed)
            self._check_lengths(self.ready)
        elif settings.prompts is not None:
            self.prompts = read_prompts(settings.prompts)
        self._check_split()

    def _check_lengths(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            check_length(reply, self.config)

    def _check_split(self) -> None:
        several = len({_key(p) for p in self.ready or self.prompts}) > 1
        if self.settings.held_out and not several:
            raise BadRecipe(
                "needs two different prompts or more", field="--held-out", allowed="0, or more data"
            )

    def identity(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What two runs must share to be one; JSON values."""
        return {
            "settings": self.settings.deciding(),
            "body": content_digest(self.settings.body / "config.json"),
            "adapter": self.adapter.digest() if self.adapter else None,
            "replies and labels": _digest([[r.ids, r.start, r.labels] for r in rows]),
        }

    def work(self, folder: Path, before: dict[str, Any] | None) -> None:
        """From replies to the classifier's folder.

        Args:
            folder: the work folder.
            before: what identifies the run that has left a checkpoint there.
        """
        replies = self.ready or self._sample(folder)
        self._check_lengths(replies)
        spans = self.labeller.label(replies, folder / LABELS)
        rows = [row(r, s, self.tokenizer) for r, s in zip(replies, spans, strict=True)]
        kept, held = _split(replies, self.settings.held_out, self.settings.seed)
        labels = [label for i in kept for label in rows[i].labels]
        if not 0 < sum(labels) < len(labels):
            raise BadRecipe(
                "there is nothing to tell apart",
                field=f"--label {self.settings.label}",
                value=f"{sum(labels)} of {len(labels)} tokens critical",
                allowed="a rule that finds some tokens critical and others not",
            )
        self.say(
            f"{len(replies)} replies, {sum(len(r.labels) for r in rows)} tokens; "
            f"{sum(labels) / len(labels):.1%} of those to train on are critical"
        )
        run = self.identity(rows)
        if before is not None:
            checkpoint.check_same(before, run, folder / "step-*")
        classifier = self._classifier(rows, kept, folder)
        fit(self.settings, classifier, rows, kept, run, folder, self.say)
        self._publish(classifier, rows, kept, held, folder)

    def _sample(self, folder: Path) -> list[Reply]:
        settings = self.settings
        assert settings.served is not None
        file = folder / SAMPLES
        if not file.exists() or file.read_bytes().count(b"\n") < len(self.prompts):
            check_server(settings.served, self.prompts, settings.body)
        samples = sample(
            settings.served,
            self.prompts,
            per_prompt=settings.samples,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            file=file,
            progress="samples",
        )
        return sampled(self.prompts, samples, self.tokenizer)

    def _classifier(self, rows: Sequence[Row], kept: Sequence[int], folder: Path) -> Classifier:
        settings = self.settings
        labels = [label for i in kept for label in rows[i].labels]
        share = sum(labels) / len(labels)
        if settings.probe:
            states = self._states(rows, folder)
            return Probe(states, kept, share, settings.hidden, settings.seed, settings.device)
        return Tagger(
            rows,
            settings.body,
            self.tokenizer,
            share=share,
            rank=settings.rank,
            seed=settings.seed,
            device=settings.device,
            dtype=settings.dtype,
        )

    def _states(self, rows: Sequence[Row], folder: Path) -> Sequence[Tensor]:
        """Computed once; a resumed run reads them."""
        settings, run = self.settings, self.identity(rows)
        what = [settings.dtype, *(run[key] for key in ("body", "adapter", "replies and labels"))]
        file = folder / f"states-{_digest(what)[:16]}.safetensors"
        if not file.exists():
            body = load_body(settings.body, self.adapter, settings.dtype, settings.device)
            with tqdm(total=len(rows), desc="states", unit="reply", disable=None) as bar:
                found = features(body, rows, settings.batch, settings.device, bar)
            part = file.with_suffix(".part")
            save_file({"states": torch.cat(found)}, part)
            os.replace(part, file)
        return load_file(file)["states"].split([len(row.labels) for row in rows])

    def _publish(
        self,
        classifier: Classifier,
        rows: Sequence[Row],
        kept: Sequence[int],
        held: Sequence[int],
        folder: Path,
    ) -> None:
        part = folder / "result"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        report = {
            "label": self.settings.label,
            "settings": self.settings.deciding(),
            "replies": len(kept),
            "tokens": sum(len(rows[i].labels) for i in kept),
            "critical": sum(sum(rows[i].labels) for i in kept),
            "held_out": _measured(self.settings, classifier, rows, held) if held else None,
        }
        classifier.write(part)
        (part / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        checkpoint.publish(part, self.settings.out)


def _check_body(settings: CriticSettings) -> Artefact | None:
    """Raises AdapterError where body or adapter cannot be used; returns the adapter."""
    check_body(settings.body)
    config = AutoConfig.from_pretrained(settings.body)
    if not settings.probe and type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise BadRecipe(
            "transformers has no token classifier of this architecture",
            field=f"--body {settings.body}",
            value=config.model_type,
            allowed="--probe, or another body",
        )
    if settings.adapter is None:
        return None
    try:
        found = inspect(settings.adapter, base_shapes(settings.body), max_rank=NO_LIMIT)
    except AdapterError as error:
        error.field = f"--adapter: {error.field}"
        raise
    if found.kind != "lora" or not found.plain:
        raise BadRecipe(
            "not a plain LoRA adapter",
            field="--adapter",
            value=found.kind,
            allowed="a folder with adapter_config.json",
        )
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _key(prompt: Prompt | Reply) -> str:
    return json.dumps(prompt.given, sort_keys=True)


def _split(replies: Sequence[Reply], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Replies to train on and to measure on: no prompt is in both; one at least in each."""
    keys = list(dict.fromkeys(_key(reply) for reply in replies))
    random.Random(f"{seed} held out").shuffle(keys)
    number = min(len(keys) - 1, max(1, round(share * len(keys)))) if share else 0
    held = set(keys[:number])
    parts: tuple[list[int], list[int]] = ([], [])
    for i, reply in enumerate(replies):
        parts[_key(reply) in held].append(i)
    return parts


@torch.inference_mode()
def _measured(
    settings: CriticSettings, classifier: Classifier, rows: Sequence[Row], held: Sequence[int]
) -> dict[str, Any]:
    parts = [held[at : at + settings.batch] for at in range(0, len(held), settings.batch)]
    scores = torch.cat([classifier.scores(part).cpu() for part in parts])
    return measures(scores, torch.tensor([label for i in held for label in rows[i].labels]))
