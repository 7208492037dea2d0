"""Both tenants at work, all the time; and what the usage of their answers says."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from load_tests.tenants.findings import Finding
from load_tests.tenants.stage import BLOCK, NAMES, Prompts, Tenant, adapter_of, profile_of

TOKENS = 2 * BLOCK + 5
PAUSE_S = 0.15
"""Mean pause of a worker between two requests."""


@dataclass
class Book:
    """What the load saw; one for all its workers.

    Args:
        seen: how many answers of each kind.
        wrong: what must not be.
    """

    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, wrong: str = "") -> None:
        """One answer."""
        with self.lock:
            self.seen[kind] += 1
            if wrong:
                self.wrong.append(wrong)

    def finding(self) -> Finding:
        """What it comes to."""
        seen = ", ".join(f"{count} {kind}" for kind, count in sorted(self.seen.items()))
        if self.wrong:
            return Finding(WHAT, seen, f"{len(self.wrong)} answers: {self.wrong[0]}")
        missing = [kind for kind in KINDS if not self.seen[kind]]
        return Finding(WHAT, seen, f"no {missing[0]}" if missing else "")


FIRST, AGAIN = "first of a tenant", "again"
KINDS = (FIRST, AGAIN)
WHAT = "usage under load: `cached_tokens` of prompts that both tenants send, each twice"


def models_of(name: str) -> tuple[str, ...]:
    """The models that a tenant may use."""
    return "base", profile_of(name), adapter_of(name)


class Worker(threading.Thread):
    """Takes prompts, has both tenants send each twice, in any order, and looks at the usage.

    Args:
        url: of the server.
        prompts: where they come from.
        book: what is seen.
        end: when to stop.
        number: of the worker.
    """

    def __init__(
        self, url: str, prompts: Prompts, book: Book, end: threading.Event, number: int
    ) -> None:
        super().__init__(daemon=True)
        self._tenants = [Tenant(name, url) for name in NAMES]
        self._prompts, self._book, self._end = prompts, book, end
        self._dice = random.Random(number)

    def run(self) -> None:
        """Until it is stopped."""
        while not self._end.is_set():
            kind = self._dice.randrange(3)
            prompt = self._prompts.new(TOKENS)
            turns = self._tenants * 2
            self._dice.shuffle(turns)
            sent: set[str] = set()
            for tenant in turns:
                try:
                    self._turn(tenant, models_of(tenant.name)[kind], prompt, tenant.name in sent)
                except Exception as error:
                    self._book.note("failed", f"{type(error).__name__}: {error}")
                sent.add(tenant.name)
                time.sleep(self._dice.uniform(0, 2 * PAUSE_S))

    def _turn(self, tenant: Tenant, model: str, prompt: list[int], again: bool) -> None:
        _, cached = tenant.ask(model, prompt)
        if not again:
            wrong = f"{tenant.name} sent a prompt of {model} for the first time: {cached} cached"
            self._book.note(FIRST, wrong if cached else "")
        else:
            # Without it nothing above could be seen.
            self._book.note(AGAIN, "" if cached else f"nothing cached at {model}, sent again")


@contextmanager
def under_load(url: str, seed: int, workers: int = 2) -> Iterator[Book]:
    """Within it, both tenants ask all the time."""
    book, end, prompts = Book(), threading.Event(), Prompts(seed)
    threads = [Worker(url, prompts, book, end, seed + n) for n in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield book
    finally:
        end.set()
        for thread in threads:
            thread.join(60)
