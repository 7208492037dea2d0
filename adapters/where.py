"""Where in a text an adapter acts: positions of the prompt, and of the reply. Needs no torch.

A position is that of a token that is *read*: an adapter that acts at a position changes the states
there, and so the token that is drawn behind it and all that is read later. The first token of the
reply is drawn from the states at the prompt's last position.

Letters: T tokens, L the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.errors import BadAdapter, Fault

MANY = 1 << 30
"""More than any text has."""

_KEYS = {"prompt_first": "first", "prompt_last": "last", "from": "start", "first": "stop"}
"""Key of the object → field."""

ALLOWED = (
    "all, prompt, reply, last_prompt, or an object with some of prompt_first, prompt_last, from, "
    f"first (whole numbers, 0 to {MANY}) and halved"
)

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, order=True)
class Where:
    """Positions: the first and the last ones of a prompt, and some of the reply behind it.

    Args:
        first: so many of the prompt's first ones.
        last: so many of the prompt's last ones.
        start: the first of the reply, counted from 0.
        stop: the last of the reply + 1.
        halved: `first` and `last` are at most L // 2 each, as LoReFT counts them
            (stanfordnlp/pyreft, `get_intervention_locations`).
    """

    first: int = 0
    last: int = 0
    start: int = 0
    stop: int = 0
    halved: bool = False

    @property
    def everywhere(self) -> bool:
        """Whether it is every position."""
        prompt = max(self.first, self.last) == MANY and not self.halved
        return prompt and not self.start and self.stop == MANY

    def active(self, ahead: Int64, lengths: Int64) -> Bool:
        """[T] whether it acts on each token.

        Args:
            ahead: [T] position − L: −1 is the prompt's last token, 0 the reply's first.
            lengths: [T] L of each token's text.
        """
        first = np.minimum(self.first, lengths // 2) if self.halved else self.first
        last = np.minimum(self.last, lengths // 2) if self.halved else self.last
        prompt = (ahead + lengths < first) | (ahead >= -last)
        reply = (ahead >= self.start) & (ahead < self.stop)
        found: Bool = np.where(ahead < 0, prompt, reply)
        return found

    def shared(self, length: int) -> int | None:
        """How many of a text's first tokens have the same states in any request that has them in a
        longer prompt; None: all of them.

        Args:
            length: L.
        """
        if self.everywhere:
            return None
        most = length // 2 if self.halved else length
        whole = self.first <= most  # of a longer prompt not one more is among the first
        if not self.last and self.start >= self.stop and whole:
            return None
        same = length - min(self.last, most)
        return max(0, same if whole or not self.halved else min(same, most))


EVERYWHERE = Where(MANY, 0, 0, MANY)

_NAMED = {
    "all": EVERYWHERE,
    "prompt": Where(first=MANY),
    "reply": Where(stop=MANY),
    "last_prompt": Where(last=1),
}


def read_where(value: Any, field: str, fault: type[Fault] = BadAdapter) -> Where:
    """Reads the positions that a request or an adapter's file gives.

    Args:
        value: JSON: a name, or an object; with `from` and no `first` the reply to its end.
        field: where it stands, for errors.
        fault: the kind of error.

    Raises:
        Fault: it says something else.
    """
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value]
    if not isinstance(value, Mapping) or not value.keys() - {"halved"}:
        raise fault("says no positions", field=field, value=value, allowed=ALLOWED)
    if "after" in value:
        raise fault("adapters act by positions; `after` is for a method's phases",
                    field=f"{field}.after", value=value["after"], allowed=ALLOWED)  # fmt: skip
    found: dict[str, Any] = {"stop": MANY} if "from" in value else {}
    for key, one in value.items():
        if key == "halved" and isinstance(one, bool):
            found[key] = one
        elif key in _KEYS and type(one) is int and 0 <= one <= MANY:
            found[_KEYS[key]] = one
        else:
            raise fault("is no position", field=f"{field}.{key}", value=one, allowed=ALLOWED)
    return Where(**found)
