"""What becomes known of one request on its way: for its metrics, its log line and its trace."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

NONE = "none"
"""A label of requests without steering, without an adapter, or refused before it is known."""

SEVERAL = "several"
"""The adapter label of a request that mixes adapters."""

ANYONE = "anyone"
"""The caller where no API keys are configured: all clients together."""

_USABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id(given: str | None) -> str:
    """The client's own id, if it is one that can be put into logs and headers; else a new one."""
    return given if given and _USABLE_ID.fullmatch(given) else uuid.uuid4().hex


@dataclass
class Trail:
    """One per HTTP request, written by those who handle it, read at its end. On the event loop.

    Args:
        id: as clients and logs know it.
        caller: fingerprint of the API key.
        model: what the request named, once it is known to be there; None: the base.
        method, profile, adapter: labels.
        digests: of the adapters.
        prompt_tokens: given to the engine for this request.
        output_tokens: drawn for it; for `best_of_n` those of all replies.
        first_token_s: seconds from the request's first byte to its first token.
        prompt: text or messages; None unless they are to be logged.
        refusal: why it was not let in, a word of `metrics.REASONS`.
    """

    id: str = ""
    caller: str = ANYONE
    model: str | None = None
    method: str = NONE
    profile: str = NONE
    adapter: str = NONE
    digests: Sequence[str] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    prompt: object = None
    refusal: str | None = None
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the first byte."""
        return time.perf_counter() - self.began

    def uses(self, adapters: Sequence[tuple[str, str | None]]) -> None:
        """Notes the request's adapters.

        Args:
            adapters: (name, digest) of each.
        """
        names = {name for name, _ in adapters}
        if names:
            self.adapter = names.pop() if len(names) == 1 else SEVERAL
        self.digests = [digest for _, digest in adapters if digest]

    def drew(self, tokens: int) -> None:
        """Counts tokens as they are drawn."""
        if tokens and self.first_token_s is None:
            self.first_token_s = self.seconds
        self.output_tokens += tokens


_current: ContextVar[Trail | None] = ContextVar("trail", default=None)


def begin(trail: Trail) -> None:
    """Makes it the one of the current request: of this task, and of those that it starts."""
    _current.set(trail)


def trail() -> Trail:
    """The current request's; outside of a request one that nobody reads."""
    return _current.get() or Trail()
