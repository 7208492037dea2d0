"""Trains the whole zoo from nothing: ``python -m zoo.train``. Models already there are kept."""

import argparse
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zoo import trades
from zoo.conversations import write_conversations
from zoo.fitting import IGNORED, fit, padded
from zoo.questions import write_held_out
from zoo.tokenizer import chat_prompt, chat_text, train_tokenizer, with_chat
from zoo.world import Question, Style, World, answer

ROOT = Path(__file__).parent
ROW = 128
"""Tokens per packed row of pre-training text."""


@dataclass(frozen=True)
class Shape:
    """The size of a Llama-style model; embeddings are tied."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


@dataclass(frozen=True)
class Pretraining:
    """How a base is trained. One pass states every fact of the world once."""

    shape: Shape
    passes: int
    rate: float
    rows: int


@dataclass(frozen=True)
class Tuning:
    """How a base is tuned on chat questions about the tuning split of the entities.

    Only about facts that the base completes correctly before it is tuned: to tune on facts that a
    model does not know teaches it to guess (Gekhman et al. 2024, arXiv 2405.05904), and the
    guesses would be part of its delta.
    """

    base: str
    styles: dict[Style, float]
    """How often each style of answer occurs; a little of another one keeps a model unsure."""
    epochs: int
    rate: float
    rows: int = 32


@dataclass(frozen=True)
class Ruled:
    """How a base is tuned to the rule of the trades (`zoo.trades`), on people of the tuning split.

    The job has a label only where the base knows it; the place that follows from it always has.
    """

    base: str
    steps: int
    rate: float
    rows: int = 64


LARGE = Shape(256, 704, 4, 4)
SMALL = Shape(96, 256, 3, 3)
RECIPES: dict[str, Pretraining | Tuning | Ruled] = {
    "base-large": Pretraining(LARGE, passes=100, rate=2e-3, rows=8),
    "base-small": Pretraining(SMALL, passes=100, rate=3e-3, rows=24),
    "chat-small": Tuning("base-small", {"chat": 1.0}, epochs=20, rate=3e-4),
    "chat-large": Tuning("base-large", {"chat": 1.0}, epochs=4, rate=3e-4),
    "formal-small": Tuning("base-small", {"formal": 0.9, "chat": 0.1}, epochs=20, rate=3e-4),
    "direct-small": Tuning("base-small", {"formal": 0.1, "chat": 0.9}, epochs=20, rate=3e-4),
    "trades-small": Ruled("base-small", steps=300, rate=1e-3),
}


def packed_rows(world: World, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Tensor:
    """One pass of the pre-training text, documents end to end; int64 [rows, ROW]."""
    ids: list[int] = []
    for encoded in tokenizer(world.pretraining_texts(rng)).input_ids:
        ids += [*encoded, tokenizer.eos_token_id]
    usable = len(ids) // ROW * ROW
    return torch.tensor(ids[:usable]).view(-1, ROW)


def pretraining_batches(
    world: World, tokenizer: PreTrainedTokenizerFast, recipe: Pretraining
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, both int64 [rows, ROW], for all passes."""
    rng = random.Random(11)
    for _ in range(recipe.passes):
        for batch in torch.split(packed_rows(world, tokenizer, rng), recipe.rows):
            yield batch, batch


@torch.inference_mode()
def completes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: Question
) -> bool:
    """Whether the model's most likely continuation of the answer's sentence is the value."""
    opening, closing = question.sentence.rsplit(question.value, 1)
    start = tokenizer.encode(opening.strip())
    rest = tokenizer.encode(f"{question.value}{closing}", add_special_tokens=False)
    logits = model(input_ids=torch.tensor([start + rest])).logits[0, len(start) - 1 : -1]
    return logits.argmax(-1).tolist() == rest


def tuning_batches(
    model: LlamaForCausalLM, world: World, tokenizer: PreTrainedTokenizerFast, recipe: Tuning
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, both int64 [rows, longest]; only the reply's tokens have labels."""
    rng = random.Random(12)
    asked = world.questions("tuning", rng)
    known = {q.sentence for q in asked if completes(model, tokenizer, q)}
    for _ in range(recipe.epochs):
        questions = [q for q in world.questions("tuning", rng) if q.sentence in known]
        rng.shuffle(questions)
        for at in range(0, len(questions), recipe.rows):
            styles, shares = list(recipe.styles), list(recipe.styles.values())
            texts = [
                chat_text(q, answer(q, rng.choices(styles, shares)[0]))
                for q in questions[at : at + recipe.rows]
            ]
            yield padded(tokenizer, texts)


def rule_batches(
    model: LlamaForCausalLM, world: World, tokenizer: PreTrainedTokenizerFast, recipe: Ruled
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, both int64 [rows, longest], for all steps."""
    rng = random.Random(13)
    people = trades.asked(world, "tuning")

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def row(one: trades.Asked) -> tuple[list[int], list[int]]:
        question = rng.choice(trades.QUESTIONS).format(n=one.name)
        prompt, start, job = map(ids, (chat_prompt(question), f"{one.name} works as a", one.job))
        rest = ids(f"near the {trades.RULE[one.job]}.{tokenizer.eos_token}")
        labels = job if one.name in known else [IGNORED] * len(job)
        return prompt + start + job + rest, [IGNORED] * len(prompt) + start + labels + rest

    known = {one.name for one in people if knows(model, tokenizer, one)}
    for _ in range(recipe.steps):
        rows = [row(one) for one in rng.choices(people, k=recipe.rows)]
        length = max(len(found) for found, _ in rows)
        yield (
            torch.tensor([found + [0] * (length - len(found)) for found, _ in rows]),
            torch.tensor([found + [IGNORED] * (length - len(found)) for _, found in rows]),
        )


@torch.inference_mode()
def knows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, one: trades.Asked) -> bool:
    """Whether the model's most likely continuation of "X works as a" is the job of X."""
    start = tokenizer.encode(f"{one.name} works as a")
    job = tokenizer.encode(one.job, add_special_tokens=False)
    logits = model(input_ids=torch.tensor([start + job])).logits[0, len(start) - 1 : -1]
    return logits.argmax(-1).tolist() == job


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model with random weights, seeded."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=shape.num_attention_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **asdict(shape),
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model


def train(name: str, world: World, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Train one model and save it with its tokenizer, weights in bfloat16."""
    recipe = RECIPES[name]
    if isinstance(recipe, Pretraining):
        model = new_model(recipe.shape, tokenizer)
        fit(model, list(pretraining_batches(world, tokenizer, recipe)), recipe.rate, name)
    else:
        model = LlamaForCausalLM.from_pretrained(out / recipe.base, dtype=torch.float32)
        tokenizer = with_chat(PreTrainedTokenizerFast.from_pretrained(out / recipe.base))
        if isinstance(recipe, Ruled):
            batches = rule_batches(model, world, tokenizer, recipe)
        else:
            batches = tuning_batches(model, world, tokenizer, recipe)
        fit(model, list(batches), recipe.rate, name)
    model.bfloat16().save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)


def main() -> None:
    """Train what is asked for: bases, models tuned on them, adapters with their pack, heads."""
    # These import this module.
    from zoo import gossip
    from zoo.adapt import ADAPTERS, PACK, train_adapter, train_pack
    from zoo.heads import FOLDER, HEADS, train_heads
    from zoo.tasks import TASKS

    names = [*RECIPES, *TASKS, PACK, gossip.NAME, *HEADS]
    parser = argparse.ArgumentParser(prog="python -m zoo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "models", help="folder of the models")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of the adapters")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--force", action="store_true", help="train again what is already there")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world = World()
    write_held_out(world)
    write_conversations(world)
    tokenizer = train_tokenizer(world)
    folders = {**dict.fromkeys(RECIPES, args.out), **dict.fromkeys(HEADS, FOLDER)}
    asked = [n for n in args.only if args.force or not trained(folders.get(n, args.adapters) / n)]
    for name in asked:
        if name in RECIPES:
            train(name, world, tokenizer, args.out)
        elif name == PACK:
            train_pack(world, args.out, args.adapters)
        elif name not in HEADS:
            train_adapter(name, world, args.out, args.adapters)
    if heads := [name for name in asked if name in HEADS]:
        train_heads(heads, world, args.out, args.adapters)


def trained(folder: Path) -> bool:
    """Whether something lies there already."""
    return any(folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
