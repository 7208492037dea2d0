"""The soak's users, as a Locust scenario; `make soak` (`python -m load_tests.soak`) starts it.

Tenants ask for everything that the zoo's server can do, in both APIs, whole and as streams; some
leave at random moments, some send what must be refused. Administrators load, replace, unload and
pin adapters that the tenants use meanwhile. Greedy answers are compared with references, token by
token; of the sampled ones some are kept, to be computed again afterwards.
"""

from __future__ import annotations

import random
from typing import Any

from locust import HttpUser, between, events, task

from load_tests.soak.admins import Brawler, Desk, Owner
from load_tests.soak.client import CHAT, TEXT, Client, open_book
from load_tests.soak.kinds import BAD, GREEDY, KINDS, QUESTIONS, Json
from zoo.questions import FOLDER, read_questions

BOOK = open_book()
ASKED = [one.question for one in read_questions(FOLDER / "test.jsonl")]
SEEDS = iter(range(1_000_000))


class Tenant(HttpUser):
    """Somebody who mixes everything."""

    wait_time = between(0.0, 0.2)

    def on_start(self) -> None:
        self.dice = random.Random(f"tenant {next(SEEDS)}")
        self.soak = Client(BOOK, self.client, self.dice)

    def _body(self, **fields: Any) -> Json:
        question = self.dice.choice(QUESTIONS)
        return {"model": "base", "messages": [{"role": "user", "content": question}],
                "max_tokens": self.dice.randint(4, 48), "temperature": 1.0, **fields}  # fmt: skip

    @task(12)
    def greedy(self) -> None:
        """An answer that is known."""
        self.soak.ask(self.dice.choice(GREEDY), greedy=True)

    @task(10)
    def sampled(self) -> None:
        """One that may be checked afterwards."""
        self.soak.ask(self.dice.choice(KINDS), greedy=False, question=self.dice.choice(ASKED))

    @task(2)
    def leaves_a_stream(self) -> None:
        """Goes in the middle of a long reply."""
        kind = self.dice.choice([kind for kind in GREEDY if not kind.changing])
        body = self._body(**kind.body(self.dice), max_tokens=200, ignore_eos=True)
        self.soak.leave_stream(body, after=self.dice.randint(1, 8))

    @task(2)
    def leaves(self) -> None:
        """Goes at any moment, also before the request is complete."""
        kind = self.dice.choice([kind for kind in KINDS if not kind.changing])
        stream = self.dice.random() < 0.5
        body = self._body(**kind.body(self.dice), max_tokens=200, stream=stream)
        self.soak.leave(body, self.host or "")

    @task(2)
    def bad(self) -> None:
        """A body that must be refused, and how."""
        status, fields = self.dice.choice(BAD)
        self.soak.refused(CHAT, status, f"refused with {status}", body=self._body(**fields))

    @task(1)
    def broken(self) -> None:
        """No JSON at all, or too much of it."""
        header = {"Content-Type": "application/json"}
        if self.dice.random() < 0.7:
            data = self.dice.choice(('{"model": "base", "messages": [', "\x00", "[1]", ""))
            self.soak.refused(TEXT, 400, "refused with 400", data=data, headers=header)
        else:
            data = '{"model": "base", "prompt": "' + "a" * 300_000 + '"}'
            self.soak.refused(TEXT, 413, "refused with 413", data=data, headers=header)


class Librarian(HttpUser):
    """An administrator with names of her own."""

    fixed_count = 2
    wait_time = between(0.2, 1.0)

    def on_start(self) -> None:
        desk = Desk(BOOK, self.client, random.Random(f"librarian {next(SEEDS)}"))
        mine, BOOK.unowned = BOOK.unowned[:2], BOOK.unowned[2:]
        self.owner = Owner(desk, [BOOK.names[name] for name in mine])

    @task
    def change(self) -> None:
        """One change."""
        self.owner.act()


class Quarreller(HttpUser):
    """One of two administrators who change the same names."""

    fixed_count = 2
    wait_time = between(0.5, 2.0)

    def on_start(self) -> None:
        desk = Desk(BOOK, self.client, random.Random(f"quarreller {next(SEEDS)}"))
        self.brawler = Brawler(desk)

    @task
    def change(self) -> None:
        """One operation."""
        self.brawler.act()


def close(**_: Any) -> None:
    """The last thing: what was collected is written."""
    BOOK.close()


events.quitting.add_listener(close)  # type: ignore[no-untyped-call]
