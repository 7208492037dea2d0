"""The labelling rule: which characters of a reply are critical.

    data               they stand in the file of ready replies
    names              numbers and names, by `adapters.training.spans.names`
    FILE.py:FUNCTION   called with the prompt (text or messages) and the reply's text
    http(s)://…        asked with POST {"prompt": text or messages, "reply": text}

The last two answer [[start, end], …], in characters of the reply.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from adapters.training.called import Called
from adapters.training.client import Peer, ask
from adapters.training.critic.replies import Reply
from adapters.training.critic.spans import Span, check_spans, names
from adapters.training.data import content_digest
from adapters.training.errors import BadRecipe
from adapters.training.journal import Journal


class Labeller:
    """A rule.

    Args:
        rule: see above.
        timeout_s: seconds that a function may take for one reply, > 0.

    Raises:
        BadRecipe: it is none, or its function cannot be loaded.
    """

    def __init__(self, rule: str, timeout_s: float) -> None:
        self._rule, self._timeout_s = rule, timeout_s
        self.identity = rule
        """Changes with the content of a function's file."""
        self._peer: Peer | None = None
        if rule.startswith(("http://", "https://")):
            self._peer = Peer(
                rule,
                "--label",
                "a service that answers in time, or a longer --label-timeout",
                timeout_s=timeout_s,
                patience_s=3 * timeout_s,
            )
            self._peer.check()
        elif ":" in rule:
            with self._called():
                file, _, name = rule.rpartition(":")
                self.identity = f"{name} {content_digest(Path(file))}"
        elif rule not in ("data", "names"):
            raise BadRecipe(
                "unknown rule",
                field="--label",
                value=rule,
                allowed="data, names, FILE.py:FUNCTION, http(s)://…",
            )

    def _called(self) -> Called:
        return Called(self._rule, "--label", "--label-timeout", self._timeout_s)

    def label(self, replies: Sequence[Reply], file: Path) -> list[list[Span]]:
        """The critical spans of each reply.

        Args:
            replies: all of them.
            file: JSONL; keeps what functions have answered, so that a killed run goes on after it.

        Raises:
            BadRecipe: the function fails, or answers something else; names the reply.
        """
        if self._rule == "data":
            return [reply.spans or [] for reply in replies]
        if self._rule == "names":
            return [names(reply.text) for reply in replies]
        marks = [_digest(self.identity, i, reply) for i, reply in enumerate(replies)]
        with Journal(file) as journal:
            known: dict[Any, Any] = {e.get("reply"): e.get("spans") for e in journal.entries}
            left = [i for i, mark in enumerate(marks) if mark not in known]
            done = len(replies) - len(left)
            bar = tqdm(total=len(replies), initial=done, desc="labels", unit="reply", disable=None)

            def keep(index: int, found: object) -> None:
                reply = replies[index]
                spans = check_spans(found, reply.text, f"{reply.where}: {self._rule}")
                known[marks[index]] = spans
                journal.add({"reply": marks[index], "spans": spans})
                bar.update()

            with bar:
                self._ask(replies, left, keep)
        return [[(start, end) for start, end in known[mark]] for mark in marks]

    def _ask(
        self, replies: Sequence[Reply], left: Sequence[int], keep: Callable[[int, object], None]
    ) -> None:
        if self._peer is not None:
            asyncio.run(_ask_all(self._peer, replies, iter(left), keep))
        elif left:
            with self._called() as called:
                for i in left:
                    reply = replies[i]
                    keep(i, called.call(reply.where, reply.given, reply.text))


def _digest(rule: str, index: int, reply: Reply) -> str:
    text = json.dumps([rule, index, reply.given, reply.text])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


async def _ask_all(
    peer: Peer, replies: Sequence[Reply], left: Iterator[int], keep: Callable[[int, object], None]
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for i in left:
            body = {"prompt": replies[i].given, "reply": replies[i].text}
            keep(i, await ask(client, peer, "POST", peer.url, body, replies[i].where))

    async with peer.client() as client:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(peer.connections):
                    group.create_task(work(client))
        except ExceptionGroup as errors:  # The first has ended the others.
            raise errors.exceptions[0] from None
