"""Makes the models of the claim `small`: text, companion, tuned companion, and the base's LoRA."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from smollm.evidence.companion import Size, directions, distil, parameters, save, sliced
from smollm.evidence.companion_text import (
    Written,
    chat_ids,
    load_texts,
    save_texts,
    subjects,
    write,
)
from smollm.evidence.desk import questions
from smollm.evidence.desk_tuning import Lesson, copied, lessons, tune, tune_base
from smollm.evidence.work import Work


@dataclass(frozen=True)
class Recipe:
    """How much is written, and how long is trained."""

    texts: int = 300
    text_tokens: int = 64
    fact_tokens: int = 20
    epochs: int = 4
    rate: float = 1e-3
    tuning_epochs: int = 4
    tuning_per_fact: int = 2
    tuning_rate: float = 1e-3
    direct_epochs: int = 1
    direct_per_fact: int = 1
    direct_rate: float = 1e-3
    width: int = 288
    layers: tuple[int, ...] = (0, 1, 29)
    most: int | None = None
    """Of facts and lessons; None: all."""


QUICK = Recipe(texts=8, text_tokens=8, fact_tokens=4, epochs=1, tuning_epochs=1, most=8)


@dataclass(frozen=True)
class Made:
    """Where the models are, and their figures."""

    companion: Path
    tuned: Path
    direct: Path
    parameters: dict[str, int]
    tokens: int
    lessons: int

    def millions(self, name: str) -> float:
        """Parameters of `base` or `companion`, in millions."""
        return self.parameters[name] / 1e6


class Workshop:
    """Makes one thing after the other in a folder; what is there is used again."""

    def __init__(self, work: Work) -> None:
        self.recipe = QUICK if work.quick else Recipe()
        self.folder = work.folder / "quick" if work.quick else work.folder
        self.seed = work.seed
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(work.model)
        self.base = LlamaForCausalLM.from_pretrained(work.model, dtype=torch.float32).eval()
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> list[Written]:
        """The base's plain replies about the tuning facts, then everyday text."""
        path = self.folder / "written.safetensors"
        if not path.is_file():
            half = copied(self.base).bfloat16().eval()
            end = int(self.tokenizer.eos_token_id)
            asked = questions("tuning", 1, self.seed)[: self.recipe.most]
            facts = [chat_ids(self.tokenizer, one.text) for one in asked]
            some = subjects(self.recipe.texts, self.seed)
            daily = [chat_ids(self.tokenizer, one) for one in some]
            texts = write(half, facts, self.recipe.fact_tokens, end=end, seed=self.seed)
            texts += write(half, daily, self.recipe.text_tokens, end=end, seed=self.seed)
            save_texts(texts, path)
        return load_texts(path)

    def companion(self, texts: Sequence[Written]) -> LlamaForCausalLM:
        """Sliced from the base and distilled."""
        out = self.folder / "companion"
        if not out.is_dir():
            sample = random.Random(self.seed).sample(list(texts), min(64, len(texts)))
            size = Size(self.recipe.width, self.recipe.layers)
            small = sliced(self.base, directions(self.base, [t.ids for t in sample], size), size)
            recipe = self.recipe
            self._say("companion", distil(small, texts, epochs=recipe.epochs, rate=recipe.rate))
            save(small, self.tokenizer, out)
        return LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()

    def lessons(self, epochs: int, per_fact: int) -> list[list[Lesson]]:
        """The desk's replies for so many passes, each in wordings and an order of its own."""
        return [
            lessons(self.tokenizer, per_fact, self.seed + number)[: self.recipe.most]
            for number in range(epochs)
        ]

    def tuned(self, companion: LlamaForCausalLM) -> None:
        """The companion, tuned to the convention."""
        out = self.folder / "tuned"
        if not out.is_dir():
            small = copied(companion)
            recipe = self.recipe
            epochs = self.lessons(recipe.tuning_epochs, recipe.tuning_per_fact)
            self._say("tuned", tune(small, epochs, rate=recipe.tuning_rate))
            save(small, self.tokenizer, out)

    def direct(self) -> None:
        """A LoRA of the base, tuned to the convention."""
        out = self.folder / "direct"
        if not (out / "adapter_config.json").is_file():  # written last
            half = copied(self.base).bfloat16()
            recipe = self.recipe
            epochs = self.lessons(recipe.direct_epochs, recipe.direct_per_fact)
            self._say("direct", tune_base(half, epochs, out, rate=recipe.direct_rate))

    @staticmethod
    def _say(name: str, losses: Sequence[float]) -> None:
        tail = losses[-10:]
        print(f"{name}: {len(losses)} steps, loss {losses[0]:.3f} -> {sum(tail) / len(tail):.3f}")


def make(work: Work) -> Made:
    """Makes what is not there yet."""
    shop = Workshop(work)
    texts = shop.write()
    companion = shop.companion(texts)
    shop.tuned(companion)
    shop.direct()
    (some,) = shop.lessons(1, shop.recipe.tuning_per_fact)
    return Made(
        shop.folder / "companion",
        shop.folder / "tuned",
        shop.folder / "direct",
        {"base": parameters(shop.base), "companion": parameters(companion)},
        sum(len(one.top) for one in texts),
        len(some),
    )
