"""Calls made from /openapi.json: no 5xx, answers as documented, and right ones beside.

`COXSWAIN_FUZZ=5000 pytest tests/server/fuzz -s` makes as many calls to each of the two APIs
(`make fuzz`); `COXSWAIN_FUZZ_SEED=7` makes others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.server.adapting.answers import Expected
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import exact
from tests.server.fuzz.calls import Fuzzer
from tests.server.fuzz.conftest import ADMIN, KEY
from tests.server.fuzz.sound import REFERENCE
from tests.server.live import Server

CALLS = int(os.environ.get("COXSWAIN_FUZZ", "250"))
SEED = int(os.environ.get("COXSWAIN_FUZZ_SEED", "1"))

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600 + CALLS)]

KINDS = (
    Kind(),
    Kind(strength=0.8, prompt=1),
    Kind((("a", 1.0, None, None),)),
    Kind((("a", 1.0, None, None), ("b", 0.5, None, None)), strength=0.8),
    Kind((("pack", 1.0, 2, 15.0),), prompt=1),
    Kind(on_chat=("f",), strength=0.8),
)
"""Requests whose answers are known: plain, steered, adapted, and together."""


CHAT = {"model": "big", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
FOUND: tuple[tuple[str, dict[str, Any]], ...] = (
    ("chat/completions", {**CHAT, "structured_outputs": True}),
    ("chat/completions", {**CHAT, "structured_outputs": [1]}),
    ("responses", {"model": "big", "input": [
        {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": []}
    ]}),
)  # fmt: skip
"""Bodies that vLLM's reader answered with 500, found by earlier runs."""


@contextmanager
def checked(server: Server, oracle: Oracle) -> Iterator[list[str]]:
    """Right answers before, all the time, and after; gives what was wrong meanwhile."""
    known: list[tuple[Kind, Expected]] = [(kind, oracle(kind)) for kind in KINDS]
    wrong: list[str] = []
    done: list[Kind] = []
    over = threading.Event()

    def ask(kind: Kind, right: Expected) -> None:
        exact(server, kind.body(REFERENCE), right)
        done.append(kind)

    def watch() -> None:
        while not over.is_set():
            for kind, right in known:
                try:
                    ask(kind, right)
                except Exception as error:
                    wrong.append(repr(error)[:2000])
                over.wait(0.5)

    for kind, right in known:
        ask(kind, right)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield wrong
    finally:
        over.set()
        thread.join()
    assert not wrong, (len(wrong), wrong[:3])
    for kind, right in known:
        ask(kind, right)
    assert len(done) >= 2 * len(known), "no answer was checked meanwhile"
    print(f"{len(done)} answers were checked meanwhile, all right")


@pytest.mark.parametrize(("path", "body"), FOUND)
def test_what_was_found_before_is_the_callers_fault(
    fuzzed: Server, path: str, body: dict[str, Any]
) -> None:
    answer = fuzzed.post(f"/v1/{path}", body)
    assert answer.status_code == 400, answer.text
    assert len(answer.json()["error"]["message"]) > 20


@pytest.mark.parametrize("api", ["inference", "admin"])
def test_no_call_breaks_anything(
    fuzzed: Server, folders: dict[str, Path], oracle: Oracle, api: str
) -> None:
    admin = api == "admin"
    fuzzer = Fuzzer(fuzzed.url, admin, ADMIN if admin else KEY, str(folders["a"].parent), SEED)
    began = time.monotonic()
    with checked(fuzzed, oracle):
        fuzzer.run(CALLS)
    took, tally = time.monotonic() - began, fuzzer.tally
    versions = ", ".join(f"{name} {version(name)}" for name in ("schemathesis", "hypothesis"))
    print(f"\n{api}: {tally.calls} calls in {took:.0f} s, seed {SEED}; {versions}\n{tally}")
    for (label, kind), examples in sorted(tally.findings.items()):
        print(f"\n{label}: {kind}, {tally.found[label, kind]} times", *examples, sep="\n  ")
    assert tally.calls >= CALLS
    assert not tally.found, tally.found
    reached = {operation.label for operation in fuzzer.operations}
    assert reached == tally.statuses.keys()
    good = {label for label in reached if tally.good(label)}
    assert good == reached, "some operation never succeeded: nothing behind its checks was reached"
    assert fuzzed.process.poll() is None
    assert "Traceback" not in fuzzed.log.read_text()


def test_a_strange_drain_is_a_drain(fuzzed: Server) -> None:
    """It reads no body; the last test, as the server ends."""
    assert fuzzed.post("/admin/drain", {}, headers={}).status_code == 401
    answer = fuzzed.post("/admin/drain", [{"drain": None}] * 100)
    assert answer.status_code == 202, answer.text
    assert fuzzed.process.wait(60) == 0
