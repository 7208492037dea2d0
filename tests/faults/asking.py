"""Good requests beside a fault: each answer compared, each other end named."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any

import httpx

from tests.faults.table import RIGHT, WRONG, Row
from tests.server.adapting.answers import TOLERANCE, Expected
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import PATIENCE_S, listing, tokens
from tests.server.adapting.traffic import ALONE
from tests.server.live import Server

HALF = len(ALONE) // 2
KINDS = tuple(ALONE[i] for i in (0, 1, 2, 7, HALF + 1, HALF + 5, HALF + 10))
"""Steered and not; one adapter, two, a pack, one on a companion; short prompts and long."""

NAMED = {
    "a": Kind((("a", 1.0, None, None),)),
    "b": Kind((("b", 1.0, None, None),)),
    "pack": Kind((("pack", 1.0, 2, 1.0),)),
    "f": Kind((), ("f",), 0.8),
}
"""A request for each adapter that every server here has."""

ERROR_EVENT, CUT = "error event", "stream broken off"


@dataclass
class Heard:
    """A stream of events, as a client hears it.

    Args:
        right: the answer.
    """

    right: Expected
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    failed: bool = False
    whole: bool = False
    begun: threading.Event = field(default_factory=threading.Event)

    def line(self, line: str) -> None:
        """One line of the answer."""
        self.whole |= line == "data: [DONE]"
        if not line.startswith("data: {"):
            return
        event = json.loads(line.removeprefix("data: "))
        self.failed |= "error" in event
        for choice in event.get("choices", ()):
            self.ids += choice.get("token_ids") or []
            if choice.get("logprobs"):
                self.logprobs += choice["logprobs"]["token_logprobs"]
            # Who sees a reason to finish takes the answer for complete.
            self.whole |= choice.get("finish_reason") is not None
        self.begun.set()

    def end(self) -> tuple[str, float]:
        """How it ended, and the largest error of what came."""
        cut = self.failed or not self.whole
        error = (self.right.first(len(self.ids)) if cut else self.right).error(
            self.ids, self.logprobs
        )
        if error >= TOLERANCE:
            return WRONG, error
        return ERROR_EVENT if self.failed else CUT if cut else RIGHT, error


def asked(
    client: httpx.Client, body: dict[str, Any], right: Expected, heard: Heard | None = None
) -> tuple[str, float]:
    """How one request ends for its client, and the error of its log-probabilities.

    Args:
        client: with the server as its base URL.
        body: the request.
        right: its answer.
        heard: asks for a stream, which is noted here.
    """
    path = "/v1/completions"
    try:
        if heard is None:
            answer = client.post(path, json=body)
            if answer.status_code != 200:
                return f"refused {answer.status_code}", 0.0
            error = right.error(*tokens(answer.json()))
            return (RIGHT if error < TOLERANCE else WRONG), error
        with client.stream("POST", path, json={**body, "stream": True}) as stream:
            if stream.status_code != 200:
                return f"refused {stream.status_code}", 0.0
            for line in stream.iter_lines():
                heard.line(line)
        return heard.end()
    except httpx.ConnectError:
        return "no connection", 0.0
    except httpx.TimeoutException:
        return "no answer", 0.0
    except httpx.TransportError:
        # The connection was closed in the middle: what came must be right as far as it goes.
        return heard.end() if heard is not None and heard.begun.is_set() else (CUT, 0.0)


class Listener(threading.Thread):
    """One request in the background.

    Args:
        server: whom.
        kind: of the request.
        oracle: knows the answer, and how long it is.
        stream: whether it is streamed.
    """

    def __init__(self, server: Server, kind: Kind, oracle: Oracle, *, stream: bool = True) -> None:
        super().__init__()
        self._body = {**kind.body({}), "max_tokens": oracle.tokens}
        self._server, self._right = server, oracle(kind)
        self.heard = Heard(self._right) if stream else None
        self.label, self.error = "", 0.0

    def run(self) -> None:
        """Asks."""
        headers = self._server.key("/v1/")
        with httpx.Client(base_url=self._server.url, timeout=PATIENCE_S, headers=headers) as client:
            self.label, self.error = asked(client, self._body, self._right, self.heard)


@dataclass(frozen=True)
class End:
    """How one request ended, and when."""

    label: str
    error: float
    begun_s: float
    ended_s: float


class Beside:
    """Users who ask without a pause while the block runs.

    Args:
        server: whom.
        oracle: knows the answers; computed before the block begins.
        clients: how many.
        kinds: of requests, in turn.
    """

    def __init__(
        self, server: Server, oracle: Oracle, clients: int = 2, kinds: Sequence[Kind] = KINDS
    ) -> None:
        self.asks = [(kind.body({}), oracle(kind)) for kind in kinds]
        self.ends: list[End] = []
        self._server, self._over = server, threading.Event()
        self._bugs: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(clients)]

    def __enter__(self) -> Beside:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._bugs and error is None:
            raise self._bugs[0]

    def _run(self, i: int) -> None:
        try:
            headers = self._server.key("/v1/")
            url = self._server.url
            with httpx.Client(base_url=url, timeout=PATIENCE_S, headers=headers) as client:
                while not self._over.is_set():
                    body, right = self.asks[i % len(self.asks)]
                    heard = Heard(right) if i // len(self.asks) % 2 else None
                    begun_s = time.monotonic()
                    label, error = asked(client, body, right, heard)
                    self.ends.append(End(label, error, begun_s, time.monotonic()))
                    if label != RIGHT:
                        time.sleep(0.2)
                    i += 1
        except BaseException as error:
            self._bugs.append(error)

    def since(self, moment_s: float) -> list[End]:
        """The requests that began after a moment of `time.monotonic()`."""
        return [end for end in self.ends if end.begun_s >= moment_s]

    def into(self, row: Row) -> None:
        """Adds what was seen to a row; nothing of it is wrong."""
        row.saw += Counter(end.label for end in self.ends)
        good = [end for end in self.ends if end.label == RIGHT]
        row.error = max([row.error, *(end.error for end in good)])
        row.slowest_s = max(seconds(good), default=None)
        assert not row.saw[WRONG], row


def seconds(ends: Sequence[End]) -> list[float]:
    """How long requests took."""
    return [end.ended_s - end.begun_s for end in ends]


def typical_s(ends: Sequence[End]) -> float:
    """The median of that."""
    return median(seconds(ends))


def answering(server: Server, oracle: Oracle) -> set[str]:
    """The adapters that are registered as ready and answer rightly now, of `NAMED`."""
    states = {record["name"]: record["state"] for record in listing(server)["adapters"]}
    found = set()
    headers = server.key("/v1/")
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, headers=headers) as client:
        for name, kind in NAMED.items():
            if states.get(name) == "ready":
                label, error = asked(client, kind.body({}), oracle(kind))
                assert label != WRONG, (name, error)
                found |= {name} if label == RIGHT else set()
    return found
