"""Linear sums as one matrix product: Σ_i c_i W_i h_i = [W_0 | W_1 | …] [c_0 h_0; c_1 h_1; …].

The streams' own scores never exist. Streams that share an unembedding (a twin and its original)
share a block, in which their scaled hidden states are summed. For rows that all sum the same
streams; docs/internals/decisions/0013-one-product.md says when this wins. Lives in the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from steering.worker.plan.layout import Layout

_LOG = logging.getLogger(__name__)

Unembed = Callable[[torch.Tensor], torch.Tensor]
"""[R, H] hidden states → [R, V] scores in the model's dtype."""


@dataclass(frozen=True)
class OneProduct:
    """Mixes rows that all sum the same streams.

    Args:
        layout: where the parts of a row lie.
        owner: [S] the first stream with the same unembedding; −1 for a stream that cannot take
            part.
        base: the base's unembedding.
        joined: owners → their unembeddings side by side.
    """

    layout: Layout
    owner: tuple[int, ...]
    base: Unembed
    joined: Mapping[tuple[int, ...], Unembed]

    def __call__(self, hidden: torch.Tensor, active: Sequence[bool]) -> torch.Tensor | None:
        """[R, V] scores in the model's dtype; None where these streams have no common table.

        Args:
            hidden: [R, width] rows of the steered model's hidden states.
            active: [S] which streams every row sums.
        """
        summed = [i for i, ran in enumerate(active) if ran]
        owners = tuple(sorted({self.owner[i] for i in summed}))
        unembed = self.base if owners == (0,) else self.joined.get(owners)
        if unembed is None:
            return None
        coef = self.layout.read_coef(hidden)
        blocks = [self._block(o, summed, hidden, coef) for o in owners]
        return unembed(blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1))

    def _block(
        self, owner: int, summed: Sequence[int], hidden: torch.Tensor, coef: torch.Tensor
    ) -> torch.Tensor:
        """[R, H] Σ c_i h_i over the streams with one unembedding; float32 until it is rounded."""
        parts = [i for i in summed if self.owner[i] == owner]
        block = hidden[:, self.layout.columns(parts[0])] * coef[:, parts[0], None]
        for i in parts[1:]:
            block.addcmul_(hidden[:, self.layout.columns(i)], coef[:, i, None])
        return block.to(hidden.dtype)


def one_product(
    layout: Layout, models: Sequence[Any], whole: Sequence[bool], sums: Sequence[Sequence[int]]
) -> OneProduct | None:
    """The one product of a steered model; None if its base cannot take part.

    Args:
        layout: of its hidden states.
        models: [S] the streams' models, base first, loaded; twins are their originals.
        whole: [S] whether the stream is a language model with the base's vocabulary.
        sums: sets of streams whose tables to lay side by side too, which takes as much memory
            as these tables; each with the base.
    """
    able = [_is_plain_matrix(m) if w else False for m, w in zip(models, whole, strict=True)]
    first: dict[int, int] = {}
    owner = tuple(
        first.setdefault(id(m), i) if a else -1
        for i, (m, a) in enumerate(zip(models, able, strict=True))
    )
    if not able[0]:
        return None
    joined: dict[tuple[int, ...], Unembed] = {}
    for streams in sums:
        owners = tuple(sorted({0, *(owner[i] for i in streams)}))
        together = _join([models[i] for i in owners]) if owners[0] == 0 else None
        if together is None:
            _LOG.warning("no table for one product of the streams %s: see decision 13", streams)
        else:
            joined[owners] = together
    return OneProduct(layout, owner, models[0].compute_logits, joined)


def _is_plain_matrix(model: Any) -> bool:
    """Whether a model's scores are a matrix times its hidden state, and nothing else."""
    head, processor = getattr(model, "lm_head", None), getattr(model, "logits_processor", None)
    if processor is None or type(processor) is not LogitsProcessor:  # one that adds adapters, say
        return False
    return (
        isinstance(getattr(head, "quant_method", None), UnquantizedEmbeddingMethod)
        and getattr(head, "bias", None) is None
        and processor.soft_cap is None
        and processor.scale == 1.0
        and _is_additive(model)
    )


def _is_additive(model: Any) -> bool:
    """Tries it: an architecture may do more in its `compute_logits` than its parts show."""
    weight = model.lm_head.weight
    rng = torch.Generator(weight.device).manual_seed(0)
    rows = torch.randn(2, weight.shape[1], generator=rng, device=weight.device)
    rows = torch.cat([rows, rows.sum(0, keepdim=True)]).to(weight.dtype)
    a, b, both = model.compute_logits(rows).float()
    want = rows.float() @ weight[: a.shape[0]].float().T
    error = (torch.stack([a, b, both]) - want).abs().max()
    return bool(error <= 0.02 * want.abs().max())


def _join(models: Sequence[Any]) -> Unembed | None:
    """The models' tables side by side, packed as vLLM packs each; None if their sizes differ."""
    size = models[0].logits_processor.org_vocab_size
    weights = [m.lm_head.weight[:size] for m in models]
    if any(m.logits_processor.org_vocab_size != size for m in models):
        return None
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(torch.cat(weights, 1), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda hidden: layer.cpu_linear(hidden, layer.weight, None)
