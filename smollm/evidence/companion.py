"""Makes a small companion of a model: some of its layers on a narrower residual stream, distilled.

The companion starts as a piece of the base. The residual stream is turned onto the principal
directions of what flows through it, and all but the first are cut off: the slicing of SliceGPT
(Ashkboos et al. 2024, arXiv 2401.15024), much deeper than there, and without most of the layers.
What that breaks is repaired by distillation on text that the base wrote itself, from its
distributions (Hinton et al. 2015, arXiv 1503.02531).
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from smollm.evidence.companion_text import Written

BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Size:
    """The companion's width, and which layers of the base it begins with."""

    width: int
    layers: tuple[int, ...]


@torch.no_grad()
def directions(base: LlamaForCausalLM, texts: Sequence[Tensor], size: Size) -> Tensor:
    """The residual stream's principal directions, float32 [hidden, width], orthonormal.

    Over what the kept layers read and write at the tokens of some texts, each state at length 1,
    and, of equal weight, the rows of the unembedding, since the companion's scores are made there.

    Args:
        base: the model.
        texts: token ids [n] each.
        size: of the companion.
    """
    hidden = base.config.hidden_size
    total = torch.zeros(hidden, hidden)
    kept = sorted({place for layer in size.layers for place in (layer, layer + 1)})
    for ids in texts:
        states = base.model(ids[None], output_hidden_states=True).hidden_states
        for place in kept:
            state = torch.nn.functional.normalize(states[place][0].float(), dim=-1)
            total += state.T @ state
    rows = torch.nn.functional.normalize(base.get_input_embeddings().weight.float(), dim=-1)
    head = rows.T @ rows
    both = total / total.trace() + head / head.trace()
    turn: Tensor = torch.linalg.eigh(both).eigenvectors.flip(1)[:, : size.width].contiguous()
    return turn


@torch.no_grad()
def sliced(base: LlamaForCausalLM, turn: Tensor, size: Size) -> LlamaForCausalLM:
    """Some layers of a model on a narrower residual stream, with tied embeddings.

    Args:
        base: a Llama model.
        turn: [hidden, width], orthonormal columns: the directions that are kept.
        size: of the companion.

    Raises:
        ValueError: the width is not a multiple of the base's number of heads: transformers would
            not save it.
    """
    heads = base.config.num_attention_heads
    if size.width % heads:
        raise ValueError(f"width is {size.width}, not a multiple of the base's {heads} heads")
    config = LlamaConfig.from_dict(base.config.to_dict())
    config.update(
        {
            "hidden_size": size.width,
            "num_hidden_layers": len(size.layers),
            "tie_word_embeddings": True,
            "head_dim": base.model.layers[0].self_attn.head_dim,
        }
    )
    small = LlamaForCausalLM(config).float()
    # A norm divides by the root of the mean square: over fewer dimensions, so its gain makes up.
    gain = math.sqrt(base.config.hidden_size / size.width)
    small.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight @ turn)
    small.model.norm.weight.fill_(gain * float(base.model.norm.weight.mean()))
    for mine, place in zip(small.model.layers, size.layers, strict=True):
        layer = base.model.layers[place]
        mine.input_layernorm.weight.fill_(gain)
        mine.post_attention_layernorm.weight.fill_(gain)
        for name in ("q_proj", "k_proj", "v_proj"):
            read = getattr(layer.self_attn, name).weight * layer.input_layernorm.weight
            getattr(mine.self_attn, name).weight.copy_(read @ turn)
        for name in ("gate_proj", "up_proj"):
            read = getattr(layer.mlp, name).weight * layer.post_attention_layernorm.weight
            getattr(mine.mlp, name).weight.copy_(read @ turn)
        mine.self_attn.o_proj.weight.copy_(turn.T @ layer.self_attn.o_proj.weight)
        mine.mlp.down_proj.weight.copy_(turn.T @ layer.mlp.down_proj.weight)
    small.tie_weights()
    return small


def parameters(model: torch.nn.Module) -> int:
    """How many numbers a model has; tied ones count once."""
    return sum(one.numel() for one in model.parameters())


def flops_per_token(model: LlamaForCausalLM) -> int:
    """Of one decoding step, without attention's own products: 2 for each weight that is read.

    The embedding is read as the head; as a table of rows it costs nothing.
    """
    return 2 * parameters(model)


def batches(texts: Sequence[Written], tokens: int, seed: int) -> Iterator[list[Written]]:
    """Texts in random batches of about so many tokens, each batch of about one length."""
    generator = random.Random(seed)
    order = sorted(texts, key=lambda one: (len(one.ids), generator.random()))
    found: list[list[Written]] = [[]]
    for text in order:
        if found[-1] and (len(found[-1]) + 1) * len(text.ids) > tokens:
            found.append([])
        found[-1].append(text)
    generator.shuffle(found)
    yield from found


def padded(texts: Sequence[Tensor]) -> Tensor:
    """Token ids [rows, longest], 0 behind shorter ones: a causal model's rows do not see that."""
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)


def divergence(scores: Tensor, top: Tensor, log_probs: Tensor) -> Tensor:
    """KL(p ‖ q) at each position, in nats, up to what lies outside of the likeliest ids.

    All ids but the kept ones are one more event, so it is never more than the whole KL.

    Args:
        scores: of q, [n, vocabulary].
        top: ids [n, k].
        log_probs: of p at these ids, [n, k].

    Returns:
        float32 [n].
    """
    log_q = scores.float().log_softmax(-1).gather(1, top)
    rest_p, rest_q = _rest(log_probs), _rest(log_q)
    kept = (log_probs.exp() * (log_probs - log_q)).sum(-1)
    return kept + rest_p.exp() * (rest_p - rest_q)


def _rest(log_probs: Tensor) -> Tensor:
    """The logarithm of what probability is left beside some."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - 1e-6))


class Text(Protocol):
    """A text whose last part, the reply, is looked at: token ids [n], and where that begins."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def start(self) -> int: ...


def reply_states(model: LlamaForCausalLM, texts: Sequence[Text]) -> Tensor:
    """The last hidden states from which the tokens of the replies follow, one reply after another.

    In bfloat16's products. Shape [tokens of all replies, width].
    """
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=padded([one.ids for one in texts]), use_cache=False)[0]
    pairs = zip(states, texts, strict=True)
    return torch.cat([row[one.start - 1 : len(one.ids) - 1] for row, one in pairs])


def scores(model: LlamaForCausalLM, states: Tensor) -> Tensor:
    """The scores [n, vocabulary] of hidden states [n, width], in bfloat16's products."""
    with torch.autocast("cpu", torch.bfloat16):
        return linear(states, model.get_output_embeddings().weight)


def fit(
    model: torch.nn.Module, losses: Sequence[Callable[[], Tensor]], rate: float, name: str
) -> list[float]:
    """Steps of AdamW with a warm-up-then-cosine rate; returns the losses.

    Args:
        model: trained in place; only what requires gradients.
        losses: each makes one step's loss.
        rate: the largest.
        name: for the progress bar.
    """
    from tqdm import tqdm

    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=BETAS, weight_decay=0.01, fused=True)
    found = []
    for step, loss_of in enumerate(tqdm(losses, desc=name, unit="step", disable=None)):
        warm = min(1.0, (step + 1) / (0.05 * len(losses)))
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(losses)))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.02 + 0.98 * cosine)
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def distil(
    small: LlamaForCausalLM,
    texts: Sequence[Written],
    *,
    epochs: int,
    rate: float = 1e-3,
    tokens: int = 1536,
    share: float = 0.5,
    seed: int = 0,
) -> list[float]:
    """Trains a model towards the distributions of texts, in place; returns the losses.

    Args:
        small: the model.
        texts: from `write`.
        epochs: passes over the texts.
        rate: AdamW's largest.
        tokens: of a step.
        share: of the positions whose scores are computed at a step; the unembedding is most of a
            small model's cost.
        seed: of the order and the positions.
    """
    generator = torch.Generator().manual_seed(seed)
    some = [batch for epoch in range(epochs) for batch in batches(texts, tokens, seed + epoch)]

    def loss(batch: Sequence[Written]) -> Tensor:
        chosen = reply_states(small, batch)
        kept = torch.rand(len(chosen), generator=generator) < share
        top = torch.cat([one.top for one in batch])[kept]
        log_probs = torch.cat([one.log_probs for one in batch])[kept]
        return divergence(scores(small, chosen[kept]), top, log_probs).mean()

    small.train()
    found = fit(small, [partial(loss, batch) for batch in some], rate, "companion")
    small.eval()
    return found


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes a model that the server can load, float32, with its tokenizer; whole or not at all."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save_pretrained(part)
    model.float().save_pretrained(part)
    part.rename(out)
