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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from adapters.training.called import Called
from adapters.training.client import Peer, ask
from adapters.training.data import content_digest
from adapters.training.errors import BadRecipe
from adapters.training.journal import Journal
from adapters.training.replies import Reply
from adapters.training.spans import Span, check_spans, names


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
            self._peer = Peer(rule, "--label", "a service that answers", timeout_s=timeout_s)
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

    def label(self, replies: Sequence[Reply], folder: Path) -> list[list[Span]]:
        """The critical spans of each reply.

        Args:
            replies: all of them.
            folder: keeps what a function has answered, so that a killed run goes on after it.

        Raises:
            BadRecipe: the function fails, or answers something else; names the reply.
        """
        if self._rule == "data":
            return [reply.spans or [] for reply in replies]
        if self._rule == "names":
            return [names(reply.text) for reply in replies]
        digest = hashlib.sha256(self.identity.encode()).hexdigest()[:16]
        with Journal(folder / f"labels-{digest}.jsonl") as journal:
            done = {entry["index"] for entry in journal.entries}
            left = [i for i in range(len(replies)) if i not in done]
            with tqdm(total=len(replies), initial=len(done), desc="labelling", unit="reply",
                      disable=None) as bar:  # fmt: skip

                def keep(index: int, found: Any) -> None:
                    reply = replies[index]
                    spans = check_spans(found, reply.text, f"{reply.where}: {self._rule}")
                    journal.add({"index": index, "spans": spans})
                    bar.update()

                self._ask(replies, left, keep)
            found = {e["index"]: [(a, b) for a, b in e["spans"]] for e in journal.entries}
        return [found[i] for i in range(len(replies))]

    def _ask(
        self, replies: Sequence[Reply], left: Sequence[int], keep: Callable[[int, Any], None]
    ) -> None:
        if self._peer is not None:
            asyncio.run(_ask_all(self._peer, replies, iter(left), keep))
        elif left:
            with self._called() as called:
                for i in left:
                    reply = replies[i]
                    keep(i, called.call(reply.where, reply.given, reply.text))


async def _ask_all(
    peer: Peer, replies: Sequence[Reply], left: Iterator[int], keep: Callable[[int, Any], None]
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
