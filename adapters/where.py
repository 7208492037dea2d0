"""Where in a text an adapter acts: positions of the prompt, and of the reply. Needs no torch.

A position is that of a token that is *read*: an adapter that acts at a position changes the states
there, and so the token that is drawn behind it and all that is read later. The first token of the
reply is drawn from the states at the prompt's last position.

Letters: T tokens, L the length of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.errors import BadAdapter, Fault

MANY = 1 << 30
"""More than any text has."""

_KEYS = {"prompt_first": "first", "prompt_last": "last", "from": "start", "first": "stop"}
"""Key of the object → field."""

_TEXTS = frozenset({"after", "until"})
_LONGEST_TEXT = 64
"""Characters, as of a text that bounds a phase."""

ALLOWED = (
    "all, prompt, reply, last_prompt, or an object with some of prompt_first, prompt_last, from, "
    f"first (whole numbers, 0 to {MANY}) and halved; or of from, first, after and until (texts)"
)

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Seen = Mapping[tuple[int, ...], Int64]


@dataclass(frozen=True, slots=True, order=True)
class Text:
    """A text that a reply may contain.

    Args:
        text: as the request wrote it.
        ids: its tokens, the base's; filled in by `steering.phases.with_ids`.
        opener: the tokens of the text that opens what this one closes; () if it closes nothing.
    """

    text: str
    ids: tuple[int, ...] = ()
    opener: tuple[int, ...] = ()


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
        after: only at tokens of the reply that have this text in front of them.
        until: only at tokens of the reply that have not.
    """

    first: int = 0
    last: int = 0
    start: int = 0
    stop: int = 0
    halved: bool = False
    after: Text | None = None
    until: Text | None = None

    @property
    def everywhere(self) -> bool:
        """Whether it is every position."""
        prompt = max(self.first, self.last) == MANY and not self.halved
        return prompt and not self.start and self.stop == MANY and not self.texts

    @property
    def texts(self) -> tuple[Text, ...]:
        """Those in the reply that bound it."""
        return tuple(text for text in (self.after, self.until) if text is not None)

    @property
    def in_prompt(self) -> bool:
        """Whether it has any position of a prompt."""
        return bool(self.first or self.last)

    def active(self, ahead: Int64, lengths: Int64, seen: Seen = MappingProxyType({})) -> Bool:
        """[T] whether it acts on each token.

        Args:
            ahead: [T] position − L: −1 is the prompt's last token, 0 the reply's first.
            lengths: [T] L of each token's text.
            seen: ids of a text → [T] how many tokens of the reply it ends behind; `MANY` where it
                is not there.
        """
        first = np.minimum(self.first, lengths // 2) if self.halved else self.first
        last = np.minimum(self.last, lengths // 2) if self.halved else self.last
        prompt = (ahead + lengths < first) | (ahead >= -last)
        reply = (ahead >= self.start) & (ahead < self.stop)
        if self.after is not None:
            reply &= ahead >= seen[self.after.ids]
        if self.until is not None:
            reply &= ahead < seen[self.until.ids]
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
REPLY = Where(stop=MANY)

_NAMED = {
    "all": EVERYWHERE,
    "prompt": Where(first=MANY),
    "reply": REPLY,
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
    bounds = _TEXTS & value.keys()
    if bounds and (own := sorted(value.keys() & {"prompt_first", "prompt_last", "halved"})):
        raise fault("a text of the reply bounds no positions of the prompt",
                    field=f"{field}.{own[0]}", value=value[own[0]], allowed=ALLOWED)  # fmt: skip
    found: dict[str, Any] = {"stop": MANY} if "from" in value or bounds else {}
    for key, one in value.items():
        if key == "halved" and isinstance(one, bool):
            found[key] = one
        elif key in _TEXTS and isinstance(one, str) and 1 <= len(one) <= _LONGEST_TEXT:
            found[key] = Text(one)
        elif key in _KEYS and type(one) is int and 0 <= one <= MANY:
            found[_KEYS[key]] = one
        else:
            raise fault("is no position", field=f"{field}.{key}", value=one, allowed=ALLOWED)
    return Where(**found)
