"""What an answer must be, and what a name may stand for. No torch: any client may use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

TOLERANCE = 1e-4
"""Of log-probabilities, float32."""


@dataclass(frozen=True)
class Expected:
    """The right answer: per token its id and log-probability, and the runner-up's."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    second_ids: tuple[int, ...]
    second: tuple[float, ...]

    def error(self, ids: Sequence[int], logprobs: Sequence[float], tie: float = TOLERANCE) -> float:
        """The largest error of an answer; infinite if its tokens are others.

        Where the two best tokens are as good as equal, within `tie`, either may be chosen, and what
        follows is another text.
        """
        worst = 0.0
        for i, (got, logprob) in enumerate(zip(ids, logprobs, strict=False)):
            if i == len(self.ids):
                break
            if got != self.ids[i]:
                close = self.logprobs[i] - self.second[i] < tie
                return worst if close and got == self.second_ids[i] else float("inf")
            worst = max(worst, abs(logprob - self.logprobs[i]))
        same_length = len(ids) == len(self.ids) and len(logprobs) == len(ids)
        return worst if same_length else float("inf")

    def first(self, count: int) -> Expected:
        """The right answer's first tokens."""
        return Expected(self.ids[:count], self.logprobs[:count], self.second_ids[:count],
                        self.second[:count])  # fmt: skip


ABSENT = ""
"""Stands for a name that is not there."""


@dataclass
class Name:
    """A name whose content changes, as the one who changes it knows it.

    Args:
        name: the adapter's.
        now: what it may stand for at this moment: two contents while one replaces the other.
        pinned: for its owner.
        content: for its owner: what it stands for when nothing is under way.
        shared: anyone changes it, so nobody knows: it may always be anything.
    """

    name: str
    now: frozenset[str] = frozenset({ABSENT})
    pinned: bool = False
    content: str = ABSENT
    shared: bool = False
    _watchers: list[set[str]] = field(default_factory=list)

    def may_be(self, *contents: str) -> None:
        """From here on it stands for one of these."""
        self.now = frozenset(contents)
        for seen in self._watchers:
            seen.update(contents)

    @contextmanager
    def watched(self) -> Iterator[set[str]]:
        """All that it may have stood for meanwhile."""
        seen = set(self.now)
        self._watchers.append(seen)
        try:
            yield seen
        finally:
            self._watchers[:] = [other for other in self._watchers if other is not seen]
