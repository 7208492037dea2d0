"""Reports: what steering did to a request, measured while it decodes.

Lives in the worker. A row reports in the step that draws its token; the token itself is known
one step later (or when the report is fetched), so what is measured waits for it. Under speculation
a request has several rows in a step, and those behind the first rejected draft drew nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
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
    draft: int | None
    """The token that speculation expects there, None if it expects none."""
    heads: tuple[str, ...]
    """Whose number is told."""
    tokens: bool
    """Whether the token gets an entry of its own."""


@dataclass
class _Waiting:
    """A row whose drawn token is not known yet.

    Args:
        row: what is known of it.
        entry: what was measured.
        base: [V] the base's log-probabilities, where the token gets an entry of its own.
        steered: [V] those that entered the sampler, likewise.
    """

    row: Marked
    entry: dict[str, Any]
    base: torch.Tensor | None
    steered: torch.Tensor | None


@dataclass
class Tally:
    """What one choice of a request has accumulated.

    Args:
        tokens: tokens drawn.
        kl_sum: Σ KL(steered ‖ base) over the drawn tokens, nats.
        changed: tokens at which the most likely id differs from the base's.
        critical: tokens that the hard rule of critical tokens found critical.
        heads: what the heads said where the last token was drawn, by name.
        passes: forward passes by stream in the steps that drew tokens.
        drafted: drafts that were verified.
        accepted: drafts among the drawn tokens.
        detail: one entry per token, when the report wants tokens.
        routed: by stream and digest of a MeteoRA pack: how often a token was routed to each
            member, over all layers; prompt tokens too, unless they came from the prefix cache.
        waiting: the rows of the last step, in the order of their places.
    """

    tokens: int = 0
    kl_sum: float = 0.0
    changed: int = 0
    critical: int = 0
    heads: dict[str, float] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    detail: list[dict[str, Any]] = field(default_factory=list)
    routed: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    waiting: list[_Waiting] = field(default_factory=list)

    def route(self, stream: str, digest: str, counts: list[int]) -> None:
        """Adds one step's routes of a pack in a stream, per member."""
        packs = self.routed.setdefault(stream, {})
        before = packs.get(digest, [0] * len(counts))
        packs[digest] = [a + b for a, b in zip(before, counts, strict=True)]

    def run(self, streams: Iterable[str], passes: int = 1) -> None:
        """Counts forward passes."""
        for name in streams:
            self.passes[name] = self.passes.get(name, 0) + passes

    def settle(self, drawn: Sequence[int | None]) -> None:
        """Counts the tokens that the last step drew, and forgets the rows that drew nothing.

        Args:
            drawn: the ids that it drew, and any number behind them; None for one that nobody
                knows.
        """
        waiting, self.waiting = self.waiting, []
        for one, token in zip(waiting, drawn, strict=False):
            self._count(one, token)

    def _count(self, one: _Waiting, token: int | None) -> None:
        row, entry = one.row, one.entry
        self.tokens += 1
        self.kl_sum += entry["kl"]
        self.changed += entry["changed"]
        self.critical += bool(entry.get("critical", False))
        self.heads = entry.get("heads", self.heads)
        self.accepted += token is not None and token == row.draft
        if token is not None and one.base is not None and one.steered is not None:
            self.detail.append(
                {
                    "token_id": token,
                    "base_logprob": float(one.base[token]),
                    "steered_logprob": float(one.steered[token]),
                    **entry,
                }
            )

    def add(
        self,
        steered: torch.Tensor,
        base: torch.Tensor,
        row: Marked,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Measures one row, which waits for its token.

        Args:
            steered: [V] log-probabilities that enter the sampler.
            base: [V] the base's own.
            row: what is known of it.
            more: what else the entry tells; `critical` is counted too, `heads` are kept.
        """
        probability = steered.exp()
        gap = torch.where(probability > 0, steered - base, 0.0)
        base_choice, choice = int(base.argmax()), int(steered.argmax())
        entry = {
            "kl": float((probability * gap).sum()),
            "base_choice": base_choice,
            "changed": choice != base_choice,
            **more,
        }
        kept = (base.clone(), steered.clone()) if row.tokens else (None, None)
        self.waiting.append(_Waiting(row, entry, *kept))

    def wire(self) -> dict[str, Any]:
        """Plain data for the front end."""
        return {
            "tokens": self.tokens,
            "kl_sum": self.kl_sum,
            "changed": self.changed,
            "critical": self.critical,
            "heads": self.heads,
            "passes": self.passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
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

    def take(self, tag: str, drawn: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
        """The report of a request, which is then forgotten.

        Args:
            tag: the request's tag.
            drawn: choice → all its tokens; the last of them no later step has seen. A choice may
                be missing: then only the first token that its last step drew is counted.
        """
        choices = self._tallies.pop(tag, {})
        for choice, tally in choices.items():
            tally.settle(drawn[choice][tally.tokens :] if choice in drawn else [None])
        return {choice: tally.wire() for choice, tally in choices.items()}


def choice_of(request_id: str) -> str:
    """The choice index of a request: vLLM names the children of `n > 1` '<index>_<id>'."""
    head, found, _ = request_id.partition("_")
    return head if found and head.isdigit() else "0"
