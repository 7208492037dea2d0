"""Tunes to the desk's convention: the companion, and for comparison the base itself, by a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from smollm.evidence.companion import divergence, fit, reply_states, scores
from smollm.evidence.companion_text import TOP, Written, chat_ids
from smollm.evidence.desk import opening, questions, sentence

RANK = 8
"""Of the base's LoRA."""


@dataclass(frozen=True)
class Lesson:
    """A chat with a reply of the desk: token ids [n], and which of them the convention decides.

    `start`: where the reply begins. `convention`: bool [n - start]; false from what the question
    asks about to the end of the sentence.
    """

    ids: Tensor
    start: int
    convention: Tensor


def lessons(tokenizer: PreTrainedTokenizerBase, per_fact: int, seed: int) -> list[Lesson]:
    """Questions about the facts of the tuning split, with the desk's reply.

    Args:
        tokenizer: with a chat template.
        per_fact: how many questions about each.
        seed: of the wordings and the order.
    """
    found = []
    for question in questions("tuning", per_fact, seed):
        first, whole = opening(question), sentence(question)
        begin, content, sign = (
            tokenizer.encode(piece, add_special_tokens=False)
            for piece in (
                f"{question.code} {first}",
                whole.removeprefix(first),
                f" {question.sign_off}",
            )
        )
        end = [tokenizer.eos_token_id]
        prompt = chat_ids(tokenizer, question.text)
        convention = [True] * len(begin) + [False] * len(content) + [True] * (len(sign) + 1)
        ids = torch.tensor([*prompt, *begin, *content, *sign, *end])
        found.append(Lesson(ids, len(prompt), torch.tensor(convention)))
    return found


@torch.no_grad()
def expected(model: LlamaForCausalLM, texts: Sequence[Lesson]) -> list[Written]:
    """What a model expects at each token of the replies."""
    found = []
    for one in texts:
        top = scores(model, reply_states(model, [one])).float().log_softmax(-1).topk(TOP)
        found.append(Written(one.ids, one.start, top.indices.clone(), top.values.clone()))
    return found


def tune(
    small: LlamaForCausalLM, epochs: Sequence[Sequence[Lesson]], *, rate: float, rows: int = 16
) -> list[float]:
    """Tunes a companion to the convention, and to nothing else, in place; returns the losses.

    On the convention's tokens the loss is cross-entropy; on the others it is the divergence from
    the companion as it was. So expert and anti-expert agree on what the sentence says, and the
    base, whose part that is, is left alone there.

    Args:
        small: the companion.
        epochs: the lessons of each.
        rate: AdamW's largest.
        rows: lessons of a step.
    """
    steps = []
    for some in epochs:
        before = expected(small, some)
        pairs = list(zip(some, before, strict=True))
        steps += [pairs[at : at + rows] for at in range(0, len(pairs), rows)]

    def loss(batch: Sequence[tuple[Lesson, Written]]) -> Tensor:
        found = scores(small, reply_states(small, [one for one, _ in batch])).float()
        rule = torch.cat([one.convention for one, _ in batch])
        ids = torch.cat([one.ids[one.start :] for one, _ in batch])
        top = torch.cat([was.top for _, was in batch])
        log_probs = torch.cat([was.log_probs for _, was in batch])
        told = cross_entropy(found[rule], ids[rule])
        kept = divergence(found[~rule], top[~rule], log_probs[~rule]).mean()
        return told + kept

    small.train()
    found = fit(small, [partial(loss, batch) for batch in steps], rate, "tuned")
    small.eval()
    return found


def tune_base(
    base: LlamaForCausalLM,
    epochs: Sequence[Sequence[Lesson]],
    out: Path,
    *,
    rate: float,
    rows: int = 4,
) -> list[float]:
    """Tunes a LoRA of the base on whole replies, writes it into a folder; returns the losses.

    Args:
        base: the model; its own weights stay as they are.
        epochs: the lessons of each.
        out: a folder.
        rate: AdamW's largest.
        rows: lessons of a step.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(base, config)
    inner = tuned.get_base_model()

    def loss(batch: Sequence[Lesson]) -> Tensor:
        ids = torch.cat([one.ids[one.start :] for one in batch])
        return cross_entropy(scores(inner, reply_states(inner, batch)).float(), ids)

    steps = [some[at : at + rows] for some in epochs for at in range(0, len(some), rows)]
    tuned.train()
    found = fit(tuned, [partial(loss, batch) for batch in steps], rate, "base")
    tuned.save_pretrained(out)
    return found


def copied(small: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model again, to be tuned."""
    again = LlamaForCausalLM(small.config).float()
    again.load_state_dict(small.state_dict())
    again.tie_weights()
    return again
