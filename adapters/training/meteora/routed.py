"""MeteoRA's forward for training, inside a transformers model, and the gates' loss.

Per adapted linear layer (arXiv 2405.13053, section 3.2), M members, k per token:

    s = W_gate x                                    [M]
    p = softmax(s);  p_j = 0 but for the k largest;  g = p / Σ p
    y = W x + Σ_j g_j · s_j · B_j A_j x

which is the serving definition (`adapters.kernels.reference`) at T = 1. The members are stacked
along the rank, so that the sum is two products with a diagonal gate between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adapters.formats.artefact import Artefact
from adapters.parts import factors
from adapters.training.errors import BadRecipe


@dataclass(frozen=True)
class Factors:
    """One member's part of a layer.

    Args:
        member: its index.
        a: [r, in].
        b: [out, r].
        scale: s_j.
    """

    member: int
    a: Tensor
    b: Tensor
    scale: float


class Routed(nn.Module):
    """A linear layer with its members and their gate. Parameters are float32.

    Args:
        base: the layer itself, any module [.., in] → [.., out].
        parts: of the members that change this layer.
        gate: W_gate, [M, in]; also the members that leave this layer alone have a row.
        top_k: k, 1 to M.
    """

    owner: Tensor
    scale: Tensor

    def __init__(self, base: nn.Module, parts: Sequence[Factors], gate: Tensor, top_k: int) -> None:
        super().__init__()
        self.base = base
        self.top_k = top_k
        self.gate = nn.Parameter(gate.float())
        self.a = nn.Parameter(torch.cat([p.a.float() for p in parts]))
        self.b = nn.Parameter(torch.cat([p.b.float() for p in parts], 1))
        owner = [p.member for p in parts for _ in range(len(p.a))]
        self.register_buffer("owner", torch.tensor(owner), persistent=False)
        scale = [p.scale for p in parts for _ in range(len(p.a))]
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.scores: Tensor | None = None

    def gates(self, scores: Tensor) -> Tensor:
        """g, float32 [.., M] of scores [.., M]: softmax, then the k largest, renormalised."""
        shares = scores.float().softmax(-1)
        values, chosen = shares.topk(self.top_k, dim=-1)
        values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(shares).scatter(-1, chosen, values)

    def forward(self, x: Tensor) -> Tensor:
        """[.., out] in the base's dtype; keeps the gate's scores for the loss."""
        self.scores = x @ self.gate.T
        shrunk = (x @ self.a.T) * self.gates(self.scores)[..., self.owner] * self.scale
        y: Tensor = self.base(x)
        return y + (shrunk.to(x.dtype) @ self.b.T).to(y.dtype)


def install(
    model: nn.Module, artefacts: Sequence[Artefact], top_k: int, gate_std: float, seed: int
) -> dict[str, Routed]:
    """Puts the adapters and fresh N(0, gate_std²) gates into a model, which is changed in place.

    Args:
        model: the base, its own parameters frozen here.
        artefacts: LoRA adapters, one member each.
        top_k: k.
        gate_std: standard deviation of the gates.
        seed: of the gates.

    Returns:
        Module name → the layer that stands there now, sorted by name.

    Raises:
        BadRecipe: the model has no module of that name.
    """
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    names = sorted({module for artefact in artefacts for module in artefact.modules})
    found = {}
    for name in names:
        parts = [
            _factors(artefact, name, member)
            for member, artefact in enumerate(artefacts)
            if name in artefact.parts[0]
        ]
        gate = gate_std * torch.randn(len(artefacts), parts[0].a.shape[1], generator=random)
        found[name] = Routed(_module(model, name), parts, gate, top_k)
        model.set_submodule(name, found[name])
    return found


def _factors(artefact: Artefact, module: str, member: int) -> Factors:
    part = artefact.parts[0][module]
    return Factors(member, *factors(artefact.folder, part), part.scale)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise BadRecipe("the base has no such module in transformers", field=name) from error


@dataclass(frozen=True)
class Losses:
    """One step's.

    Args:
        language: mean cross-entropy of the tokens that have labels.
        gates: mean over all gates of the mean cross-entropy over the tokens.
        hit: share of (token, gate) pairs whose highest score is the right member's.
    """

    language: Tensor
    gates: Tensor
    hit: Tensor


def losses(
    model: Any,
    layers: dict[str, Routed],
    ids: Tensor,
    labels: Tensor,
    members: Tensor,
    ignored: int,
) -> Losses:
    """Runs a batch.

    Args:
        model: with `layers` installed.
        layers: from `install`.
        ids: [rows, T] int64, padded on the right.
        labels: [rows, T] int64, `ignored` where a token does not count.
        members: [rows, T] int64, `ignored` in the padding.
        ignored: see there.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    language = cross_entropy(
        logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=ignored
    )
    real = members != ignored
    wanted = members[real]
    totals, hits = [], []
    for layer in layers.values():
        assert layer.scores is not None
        scores = layer.scores[real].float()
        totals.append(cross_entropy(scores, wanted))
        hits.append((scores.detach().argmax(-1) == wanted).float().mean())
        layer.scores = None
    return Losses(language, torch.stack(totals).mean(), torch.stack(hits).mean())
