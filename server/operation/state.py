"""Where the server is in its life: starting → ready → draining, or dead. Owned by `launch`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["starting", "ready", "draining", "dead"]


@dataclass
class ServerState:
    """One per process, touched from the event loop only.

    Args:
        phase: what the server does now.
        reason: a sentence for `/ready`: what is being loaded, or why it died.
        in_flight: inference requests whose answer is not complete.
        leaving: `/ready` says no already, requests are still taken.
        start_s: seconds from the first moment to being ready.
        heard: `time.monotonic()` at the engine's last answer.
    """

    phase: Phase = "starting"
    reason: str = "starting"
    in_flight: int = 0
    leaving: bool = False
    start_s: float = 0.0
    heard: float = field(default_factory=time.monotonic)
    born: float = field(default_factory=time.monotonic)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    drain: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to ask for an orderly end (signal, or POST /admin/drain)."""

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def age_s(self) -> float:
        """Seconds since the process began to serve."""
        return time.monotonic() - self.born

    @property
    def silent_s(self) -> float:
        """Seconds since the engine answered last."""
        return time.monotonic() - self.heard

    @property
    def ending(self) -> bool:
        """Whether clients should look elsewhere."""
        return self.leaving or self.phase in ("draining", "dead")

    def become_ready(self) -> None:
        """The start is over."""
        self.phase, self.reason, self.start_s = "ready", "", self.age_s
        self.hear()

    def hear(self) -> None:
        """The engine has answered."""
        self.heard = time.monotonic()

    def enter(self) -> None:
        """Counts one inference request in."""
        self.in_flight += 1
        self.idle.clear()

    def leave(self) -> None:
        """Counts one inference request out."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()
