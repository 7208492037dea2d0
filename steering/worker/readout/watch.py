"""Finds streams and heads whose numbers are NaN or infinite, while they are served.

A checkpoint may be damaged, and float16 overflows. vLLM draws from such scores all the same: an id
that means nothing, with status 200. Here a flag per request goes to the scheduler beside the drawn
tokens, and the scheduler ends the request with an error that names the stream.

The flag is taken from the largest score, which is NaN where any is: one pass over what the
unembedding has just written, a few hundredths of its time at most. Flags stay on the device until
the tokens go out, and nothing waits for the device.
A score of −∞ is no fault: models rule ids out so.

Lives in the worker. Letters: Q requests of the step, R rows of scores, K drafts of the request
that has most, V a vocabulary; bit i of a flag stands for `names[i]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from steering.worker.plan.staging import HostCopy

NOTHING_LEFT = 1 << 62
"""The flag of a request whose constraints leave no id; no stream's bit."""

Suspects = Callable[[slice | torch.Tensor], int]
"""Rows → the bits of the streams at fault there, where a flag says only that one of several is."""


@dataclass
class Watch:
    """Collects the flags of a step.

    Args:
        names: streams, then heads.
    """

    names: tuple[str, ...]
    flags: torch.Tensor | None = None
    """[Q] int64 of the step so far, on the device; None before the first number was looked at."""
    at_fault: frozenset[int] = frozenset()
    """Requests of the step whose streams or heads were found at fault by `take`."""
    suspects: Suspects | None = None
    """Finds the streams at fault on a host that may wait, if this step's flags name several."""
    _requests: int = 0
    _count: int = 0
    _rows: torch.Tensor | None = None
    _table: torch.Tensor | None = None
    _sent: HostCopy | None = field(default=None, repr=False)

    def begin_step(self, requests: int) -> None:
        """A new step of Q requests."""
        self._requests = requests
        self._count, self.flags = 0, None
        self.suspects = self._rows = self._table = self._sent = None
        self.at_fault = frozenset()

    def requests(self, i: int, numbers: torch.Tensor, requests: torch.Tensor | None = None) -> None:
        """Looks at [n] numbers of stream or head i.

        Args:
            i: its bit.
            numbers: one for each of `requests`.
            requests: [n] int64 distinct numbers of requests of the step; None: all, in order.
        """
        flags = _bad(numbers) * (1 << i)
        self.flags = _or(self.flags, flags, requests, self._requests)

    def left(self, nothing: torch.Tensor) -> None:
        """Takes [Q] bool, whether a request's constraints have left nothing where it drew."""
        self.flags = _or(self.flags, nothing * NOTHING_LEFT, None, self._requests)

    # --- the rows of the read-out, several of a request under speculation -----------------------

    def begin_rows(self, rows: int) -> None:
        """R rows of requests follow, until `end_rows`; rows of prompts are not looked at."""
        self._count, self._rows = rows, None

    def scores(
        self,
        i: int,
        scores: torch.Tensor,
        rows: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
    ) -> None:
        """Looks at [n, V] raw scores of stream i; other arguments as of `numbers`."""
        if self._count and scores.numel():
            self.numbers([i], scores.amax(-1), rows, counted)

    def numbers(
        self,
        bits: Sequence[int],
        numbers: torch.Tensor,
        rows: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
    ) -> None:
        """Looks at [n] numbers of a stream or head, or of several together.

        Args:
            bits: theirs.
            numbers: one for each of `rows`.
            rows: [n] int64, which of the R; None: all.
            counted: [n] bool, which numbers mean something; None: all.
        """
        if not self._count:
            return
        bad = _bad(numbers)
        flags = (bad if counted is None else bad & counted) * sum(1 << i for i in bits)
        self._rows = _or(self._rows, flags, rows, self._count)

    def end_rows(self, table: torch.Tensor | None) -> None:
        """The rows are complete.

        Args:
            table: [Q, K + 1] int64, the rows of each request, its last one repeated if it has
                fewer; None: row q is request q's.
        """
        rows, self._count, self._rows, self._table = self._rows, 0, None, table
        if rows is not None:
            for flags in [rows] if table is None else rows[table].unbind(1):
                self.flags = _or(self.flags, flags, None, self._requests)

    # --- on the host ----------------------------------------------------------------------------

    def send(self) -> None:
        """Starts the flags on their way to the host: nothing comes to them any more."""
        if self.flags is not None:
            self._sent = HostCopy(self.flags)

    def take(self) -> dict[int, int]:
        """Number of a request of the step → its flag, for those at fault.

        Called when the drawn tokens are on the host, so nothing is left to wait for.
        """
        if self._sent is None:
            self.send()
        flags = [] if self._sent is None else self._sent.read().tolist()
        faults = {request: flag for request, flag in enumerate(flags) if flag}
        if self.suspects is not None:
            for q, flag in faults.items():
                rows = slice(q, q + 1) if self._table is None else self._table[q]
                faults[q] = self.suspects(rows) | (flag & NOTHING_LEFT) or flag
        self.begin_step(self._requests)
        self.at_fault = frozenset(i for i, flag in faults.items() if flag & ~NOTHING_LEFT)
        return faults


def _bad(numbers: torch.Tensor) -> torch.Tensor:
    """Which numbers are NaN or infinite: their difference to themselves is not 0."""
    return (numbers - numbers) != 0


def _or(
    flags: torch.Tensor | None, more: torch.Tensor, at: torch.Tensor | None, count: int
) -> torch.Tensor:
    """[count] the flags, with more at some places (None: at all)."""
    if at is None:
        return more if flags is None else flags | more
    flags = more.new_zeros(count) if flags is None else flags.clone()
    flags[at] |= more
    return flags


def named(flag: int, names: Sequence[str]) -> list[str]:
    """The streams and heads of a flag, each once."""
    return list(dict.fromkeys(name for i, name in enumerate(names) if flag >> i & 1))
