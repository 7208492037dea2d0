"""Finds streams and heads whose numbers are NaN or infinite, while they are served.

A checkpoint may be damaged, and float16 overflows. vLLM draws from such scores all the same: an id
that means nothing, with status 200. Here a flag per row goes with the row's request to where the
drawn tokens are fetched, and the scheduler ends the request with an error that names the stream.

The flag is taken from the largest score, which is NaN where any is: one pass over what the
unembedding has just written, a few hundredths of its time at most, and nothing waits for the
device.
A score of −∞ is no fault: models rule ids out so.

Lives in the worker. Letters: R rows, V a vocabulary; bit i of a flag stands for `names[i]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

NOTHING_LEFT = 1 << 62
"""The flag of a request whose constraints leave no id; no stream's bit."""

Suspects = Callable[[int], int]
"""Row → the bits of the streams at fault, where a flag says only that one of several is."""


@dataclass
class _Note:
    """The flags of one call: [R] int64, and [R] 1 + number of the row's request; on the host."""

    flags: torch.Tensor
    requests: torch.Tensor | None
    suspects: Suspects | None
    done: torch.cuda.Event | None


@dataclass
class Watch:
    """Collects the flags of a step.

    Args:
        names: streams, then heads.
    """

    names: tuple[str, ...]
    _flags: torch.Tensor | None = None
    _rows: torch.Tensor | None = None
    _notes: list[_Note] = field(default_factory=list)
    _known: dict[int, int] = field(default_factory=dict)
    at_fault: frozenset[int] = frozenset()
    """Requests of the step whose streams or heads were found at fault by `take`."""

    def forget(self) -> None:
        """A new step."""
        self._flags, self._notes, self._known = None, [], {}
        self.at_fault = frozenset()

    def begin(self, rows: int, device: torch.device) -> None:
        """R rows follow."""
        self._flags = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows = None

    def only(self, rows: torch.Tensor) -> None:
        """What follows is of some of the rows, [n] int64, and counts these."""
        self._rows = rows

    def scores(self, i: int, scores: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Looks at [n, V] raw scores of stream i.

        Args:
            i: the stream.
            scores: of `rows`.
            rows: [n] int64, which of the R; None: all.
        """
        if scores.numel():
            self.numbers(i, scores.amax(-1), rows)

    def numbers(self, i: int, numbers: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Looks at [n] numbers of head or stream i; other arguments as of `scores`."""
        if self._flags is None:
            return
        found = (~torch.isfinite(numbers)).long() << i
        if self._rows is not None:
            rows = self._rows if rows is None else self._rows[rows]
        if rows is None:
            self._flags |= found
        else:
            self._flags[rows] |= found

    def end(self, requests: torch.Tensor | None, suspects: Suspects | None = None) -> None:
        """The rows are complete.

        Args:
            requests: [R] float32, 1 + number of each row's request in the step, 0 for none; None:
                row r is of request r.
            suspects: finds which stream it was, if the flags name several.
        """
        if self._flags is None:
            return
        flags, done = self._flags, None
        if flags.device.type == "cuda":
            flags, requests = _to_host(flags), None if requests is None else _to_host(requests)
            done = torch.cuda.Event()
            done.record()
        self._notes.append(_Note(flags, requests, suspects, done))
        self._flags = None

    def base(self, scores: torch.Tensor | None) -> torch.Tensor | None:
        """Looks at the scores of a step of the base alone, and gives them back.

        The first call of such a step has the rows that draw, one per request; others, for prompts,
        do not tell whose they are. A prompt with such scores goes on with them.
        """
        if scores is not None and not self._notes:
            self.begin(len(scores), scores.device)
            self.scores(0, scores)
            self.end(None)
        return scores

    def values(self, i: int, numbers: torch.Tensor, requests: npt.NDArray[np.int64]) -> None:
        """Looks at what value stream i said of requests of the step, [n] each."""
        self.begin(len(requests), numbers.device)
        self.numbers(i, numbers)
        self.end(torch.from_numpy(requests + 1).to(numbers.device, torch.float32))

    def left(self, scores: torch.Tensor) -> None:
        """Looks at [Q, V] what the requests' constraints have left, one row per request."""
        self.begin(len(scores), scores.device)
        assert self._flags is not None
        self._flags |= (scores.amax(-1) == -math.inf).long() * NOTHING_LEFT
        self.end(None)

    def told(self, head: str, number: float, request: int) -> None:
        """Looks at a number that is on the host already."""
        if not math.isfinite(number):
            flag = 1 << self.names.index(head)
            self._known[request] = self._known.get(request, 0) | flag

    def take(self) -> dict[int, int]:
        """Number of a request of the step → its flag, for those at fault.

        Called when the drawn tokens are on the host, so nothing is left to wait for.
        """
        found = dict(self._known)
        for note in self._notes:
            if note.done is not None:
                note.done.synchronize()
            for row in torch.nonzero(note.flags)[:, 0].tolist():
                flag = int(note.flags[row])
                if note.suspects is not None:
                    flag = note.suspects(row) or flag
                request = row if note.requests is None else int(note.requests[row]) - 1
                if request >= 0:
                    found[request] = found.get(request, 0) | flag
        self.forget()
        self.at_fault = frozenset(i for i, flag in found.items() if flag & ~NOTHING_LEFT)
        return found


def named(flag: int, names: Sequence[str]) -> list[str]:
    """The streams and heads of a flag, each once."""
    return list(dict.fromkeys(name for i, name in enumerate(names) if flag >> i & 1))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
