"""One HTTP request from its first byte to its last: who asks, for what, and how it ended.

`server.operation.access_log` makes one for each request and puts it into the ASGI scope's `state`,
where Starlette shows it as `request.state.context`. Everything that handles the request gets it
from there and passes it on by hand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from starlette.types import Scope

from server.access import EVERYTHING, Access
from server.errors import HttpError

NONE = "none"
"""A label of requests without steering, without an adapter, or refused before it is known."""

SEVERAL = "several"
"""The adapter label of a request that mixes adapters."""

LEFT = 499
"""The status of a request whose client left before its answer was complete."""

KEY = "context"
"""Where it stands in the scope's `state`."""


@dataclass
class RequestContext:
    """One per HTTP request, on the event loop.

    Args:
        id: as clients and logs know it.
        access: what the caller's key may use.
        model: what the request named, once it is known to be there; None: the base.
        method, profile, adapter: labels.
        private: an adapter of the request is private to some groups of keys.
        digests: of the adapters.
        prompt: text or messages; None unless they are to be logged.
        prompt_tokens: given to the engine for this request.
        output_tokens: drawn for it; for `best_of_n` those of all replies, for `guided_search`
            those of all blocks.
        first_token_s: seconds from the request's first byte to its first token.
        sent_status: HTTP status that was sent; 500 until then.
        left: the client left before the answer was complete.
        headers: more headers of its answer, whichever part gives it.
        refusal: why it was not let in, a word of `metrics.REASONS`.
        failure: what ended an answer whose status was out already.
        fields: vLLM's names of its fields → its own, for errors.
        events: of its stream that are sent.
        resources: what the request holds; closed when its response is complete.
    """

    id: str = ""
    access: Access = EVERYTHING
    model: str | None = None
    method: str = NONE
    profile: str = NONE
    adapter: str = NONE
    private: bool = False
    digests: Sequence[str] = ()
    prompt: object = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float | None = None
    sent_status: int = 500
    left: bool = False
    headers: Sequence[tuple[bytes, bytes]] = ()
    refusal: str | None = None
    failure: HttpError | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    events: int = 0
    resources: ExitStack = field(default_factory=ExitStack)
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the first byte."""
        return time.perf_counter() - self.began

    @property
    def status(self) -> int:
        """How it ended: the status that was sent, unless the answer broke off after that."""
        if self.failure is not None:
            return self.failure.status
        return LEFT if self.left else self.sent_status

    def fail(self, error: HttpError) -> None:
        """Notes what ended an answer whose status was out already; the first reason stays."""
        if self.failure is None:
            self.failure = error

    def use_adapters(self, adapters: Sequence[tuple[str, str]], private: bool = False) -> None:
        """Notes the request's adapters.

        Args:
            adapters: (name, digest) of each.
            private: one of them is private to some groups of keys.
        """
        self.private = private
        names = {name for name, _ in adapters}
        if names:
            self.adapter = names.pop() if len(names) == 1 else SEVERAL
        self.digests = [digest for _, digest in adapters]

    def count_drawn(self, tokens: int) -> None:
        """Counts tokens as they are drawn."""
        if tokens and self.first_token_s is None:
            self.first_token_s = self.seconds
        self.output_tokens += tokens


def with_context(scope: Scope, context: RequestContext) -> Scope:
    """The scope with a request's context in it."""
    return {**scope, "state": {**scope.get("state", {}), KEY: context}}


def context_of(scope: Scope) -> RequestContext:
    """The context of the request that a scope belongs to."""
    context: RequestContext = scope["state"][KEY]
    return context
