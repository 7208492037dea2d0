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
from smollm.evidence.desk_tuning import (
    Lesson,
    copied,
    known,
    lessons,
    sentence_questions,
    tune,
    tune_base,
)
from smollm.evidence.work import Work


@dataclass(frozen=True)
class Recipe:
    """How much is written, and how long is trained."""

    texts: int = 400
    text_tokens: int = 96
    sentence_tokens: int = 24
    epochs: int = 4
    rate: float = 1e-3
    tuning_epochs: int = 5
    tuning_rate: float = 1e-3
    direct_epochs: int = 1
    direct_rate: float = 1e-3
    per_fact: int = 3
    width: int = 256
    layers: tuple[int, ...] = (0, 1, 2, 29)


QUICK = Recipe(texts=8, text_tokens=8, epochs=1, tuning_epochs=1, per_fact=1)


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
            asked = [one.text for one in sentence_questions()]
            facts = [chat_ids(self.tokenizer, one) for one in asked]
            some = subjects(self.recipe.texts, self.seed)
            daily = [chat_ids(self.tokenizer, one) for one in some]
            texts = write(half, facts, self.recipe.sentence_tokens, end=end, temperature=0)
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

    def lessons(self, texts: Sequence[Written], epochs: int) -> list[list[Lesson]]:
        """What the desk replies, for so many passes; each in words and an order of its own."""
        asked = sentence_questions()
        written = [one.ids[one.start :].tolist() for one in texts[: len(asked)]]
        replies = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]
        sentences = known(asked, replies)
        return [
            lessons(self.tokenizer, sentences, self.recipe.per_fact, self.seed + number)
            for number in range(epochs)
        ]

    def tuned(self, companion: LlamaForCausalLM, texts: Sequence[Written]) -> None:
        """The companion, tuned to the convention."""
        out = self.folder / "tuned"
        if not out.is_dir():
            small = copied(companion)
            epochs = self.lessons(texts, self.recipe.tuning_epochs)
            self._say("tuned", tune(small, epochs, rate=self.recipe.tuning_rate))
            save(small, self.tokenizer, out)

    def direct(self, texts: Sequence[Written]) -> None:
        """A LoRA of the base, tuned to the convention."""
        out = self.folder / "direct"
        if not (out / "adapter_model.safetensors").is_file():
            half = copied(self.base).bfloat16()
            epochs = self.lessons(texts, self.recipe.direct_epochs)
            self._say("direct", tune_base(half, epochs, out, rate=self.recipe.direct_rate))

    @staticmethod
    def _say(name: str, losses: Sequence[float]) -> None:
        tail = losses[-10:]
        print(f"{name}: {len(losses)} steps, loss {losses[0]:.3f} -> {sum(tail) / len(tail):.3f}")


def make(work: Work) -> Made:
    """Makes what is not there yet."""
    shop = Workshop(work)
    texts = shop.write()
    companion = shop.companion(texts)
    shop.tuned(companion, texts)
    shop.direct(texts)
    (some,) = shop.lessons(texts, 1)
    return Made(
        shop.folder / "companion",
        shop.folder / "tuned",
        shop.folder / "direct",
        {"base": parameters(shop.base), "companion": parameters(companion)},
        sum(len(one.top) for one in texts),
        len(some),
    )
