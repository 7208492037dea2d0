"""Reports: what steering did to a request, measured while it decodes.

Lives in the worker. Every step that draws for a request leaves a record of its own. vLLM may draw
more than the request is given (behind its end under speculation, or where a step was scheduled
before the end was known), so the front end says how many tokens count when it fetches the report.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT = 1024
"""Reports kept for requests whose report is never fetched (aborted ones)."""


@dataclass(slots=True)
class StepRecord:
    """One step that drew for a choice.

    Args:
        passes: forward passes by stream.
        drafted: drafts that were verified.
        entries: the drawn tokens, in order: `kl` in nats, whether the most likely id was `changed`,
            and what else the report has of them. They come when they have reached the host.
    """

    passes: dict[str, int]
    drafted: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """The accumulated measurements of one choice of a request.

    Args:
        detailed: whether the report has an entry for every token.
        steps: records of the steps that drew, in order.
        routes: (number of the step that draws next, stream, digest of a MeteoRA pack, how often a
            token was routed to each member, over all layers); prompt tokens too, unless they came
            from the prefix cache.
    """

    detailed: bool = False
    steps: list[StepRecord] = field(default_factory=list)
    routes: list[tuple[int, str, str, list[int]]] = field(default_factory=list)

    def begin(self, streams: Iterable[str], drafted: int) -> StepRecord:
        """The record of a step that draws, with one pass of a stream each time it is named."""
        record = StepRecord(dict(Counter(streams)), drafted)
        self.steps.append(record)
        return record

    def draft(self, stream: str, passes: int) -> None:
        """Counts what a stream ran behind the last step, to draft for the next one."""
        if self.steps:
            ran = self.steps[-1].passes
            ran[stream] = ran.get(stream, 0) + passes

    def _routed(self, steps: int) -> dict[str, dict[str, list[int]]]:
        """By stream and digest: the routes up to so many steps that drew."""
        found: dict[str, dict[str, list[int]]] = {}
        for step, stream, digest, counts in self.routes:
            if step < max(steps, 1):
                packs = found.setdefault(stream, {})
                before = packs.get(digest, [0] * len(counts))
                packs[digest] = [a + b for a, b in zip(before, counts, strict=True)]
        return found

    def wire(self, tokens: int | None) -> dict[str, Any]:
        """Plain data for the front end, of the first tokens (None: all)."""
        passes: dict[str, int] = {}
        entries: list[dict[str, Any]] = []
        drafted = accepted = counted = 0
        for step in self.steps:
            if tokens is not None and len(entries) >= tokens:
                break
            counted += 1
            drawn = len(step.entries)
            left = drawn if tokens is None else tokens - len(entries)
            for name, count in step.passes.items():
                passes[name] = passes.get(name, 0) + count
            drafted += step.drafted
            # All tokens of a step are drafts but the last, which was drawn behind them.
            accepted += max(min(drawn - 1, left), 0)
            entries += step.entries[:left]
        likelihoods: dict[str, float] = {}
        for entry in entries:
            for name, number in entry.get("likelihoods", {}).items():
                likelihoods[name] = likelihoods.get(name, 0.0) + number
        heads: dict[str, float] = next((e["heads"] for e in reversed(entries) if "heads" in e), {})
        return {
            "tokens": len(entries),
            "kl_sum": sum(e["kl"] for e in entries),
            "changed": sum(e["changed"] for e in entries),
            "critical": sum(e.get("critical", False) for e in entries),
            "heads": heads,
            "likelihoods": likelihoods,
            "passes": passes,
            "drafted": drafted,
            "accepted": accepted,
            "detail": entries if self.detailed else [],
            "routed": self._routed(counted),
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

    def take(self, tag: str, tokens: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """The report of a request, which is then forgotten.

        Args:
            tag: the request's tag.
            tokens: choice → how many tokens it has; all that were drawn for one that is missing.
        """
        choices = self._tallies.pop(tag, {})
        return {choice: tally.wire(tokens.get(choice)) for choice, tally in choices.items()}


def choice_of(request_id: str) -> str:
    """The choice index of a request: vLLM names the children of `n > 1` '<index>_<id>'."""
    head, separator, _ = request_id.partition("_")
    return head if separator and head.isdigit() else "0"
