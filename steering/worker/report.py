"""Reports: what steering did to a request, measured while it decodes.

Lives in the worker. A row reports in the step that draws its token; the token itself is known
one step later (or when the report is fetched), so a token-level entry waits with its scores.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

KEPT = 1024
"""Reports kept for requests whose report is never fetched (aborted ones)."""


class Marked(NamedTuple):
    """A row that reports in this step."""

    tag: str
    choice: str
    place: int
    """Of the drawn token in its request."""
    streams: list[str]
    """That ran for it."""
    heads: tuple[str, ...]
    """Whose number is told."""
    tokens: bool
    """Whether the token gets an entry of its own."""


@dataclass
class _Pending:
    """A drawn token whose id is not known yet."""

    index: int
    base: torch.Tensor
    steered: torch.Tensor
    entry: dict[str, Any]


@dataclass
class Tally:
    """What one choice of a request has accumulated.

    Args:
        tokens: tokens drawn.
        kl_sum: Σ KL(steered ‖ base) over the drawn tokens, nats.
        changed: tokens at which the most likely id differs from the base's.
        critical: tokens that the hard rule of critical tokens found critical.
        heads: what the heads said where the last token was drawn, by name.
        passes: forward passes by stream over the drawn tokens.
        detail: one entry per token, when the report wants tokens.
        routed: by stream and digest of a MeteoRA pack: how often a token was routed to each
            member, over all layers; prompt tokens too, unless they came from the prefix cache.
    """

    tokens: int = 0
    kl_sum: float = 0.0
    changed: int = 0
    critical: int = 0
    heads: dict[str, float] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    detail: list[dict[str, Any]] = field(default_factory=list)
    routed: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    pending: _Pending | None = None

    def route(self, stream: str, digest: str, counts: list[int]) -> None:
        """Adds one step's routes of a pack in a stream, per member."""
        packs = self.routed.setdefault(stream, {})
        before = packs.get(digest, [0] * len(counts))
        packs[digest] = [a + b for a, b in zip(before, counts, strict=True)]

    def settle(self, token_id: int) -> None:
        """Tells the drawn token's id to the entry that waits for it."""
        if self.pending is None:
            return
        waiting, self.pending = self.pending, None
        self.detail.append(
            {
                "token_id": token_id,
                "base_logprob": float(waiting.base[token_id]),
                "steered_logprob": float(waiting.steered[token_id]),
                **waiting.entry,
            }
        )

    def add(
        self,
        steered: torch.Tensor,
        base: torch.Tensor,
        row: Marked,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Counts one drawn token.

        Args:
            steered: [V] log-probabilities that enter the sampler.
            base: [V] the base's own.
            row: what is known of it.
            more: what else the entry tells; `critical` is counted too, `heads` are kept.
        """
        probability = steered.exp()
        gap = torch.where(probability > 0, steered - base, 0.0)
        kl = float((probability * gap).sum())
        base_choice, choice = int(base.argmax()), int(steered.argmax())
        self.tokens += 1
        self.kl_sum += kl
        self.changed += choice != base_choice
        self.critical += bool(more.get("critical", False))
        self.heads = more.get("heads", self.heads)
        for name in row.streams:
            self.passes[name] = self.passes.get(name, 0) + 1
        if row.tokens:
            entry = {"kl": kl, "base_choice": base_choice, "changed": choice != base_choice}
            entry |= more
            self.pending = _Pending(row.place, base.clone(), steered.clone(), entry)

    def wire(self) -> dict[str, Any]:
        """Plain data for the front end."""
        return {
            "tokens": self.tokens,
            "kl_sum": self.kl_sum,
            "changed": self.changed,
            "critical": self.critical,
            "heads": self.heads,
            "passes": self.passes,
            "detail": self.detail,
            "routed": self.routed,
        }


class ReportBook:
    """Tallies by tag and choice; the oldest are dropped beyond `KEPT` tags."""

    def __init__(self) -> None:
        self._tallies: OrderedDict[str, dict[str, Tally]] = OrderedDict()

    def tally(self, tag: str, choice: str) -> Tally:
        """The tally of one choice, new if it has none."""
        choices = self._tallies.setdefault(tag, {})
        if len(self._tallies) > KEPT:
            self._tallies.popitem(last=False)
        return choices.setdefault(choice, Tally())

    def take(self, tag: str, finals: dict[str, int]) -> dict[str, dict[str, Any]]:
        """The report of a request, which is then forgotten.

        Args:
            tag: the request's tag.
            finals: choice → its last token's id, which no later step has seen.
        """
        choices = self._tallies.pop(tag, {})
        for choice, tally in choices.items():
            if choice in finals:
                tally.settle(finals[choice])
        return {choice: tally.wire() for choice, tally in choices.items()}
