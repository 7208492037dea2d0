"""A server whose engine fails to load: nobody gets somebody else's adapter, and the record says
whose fault it was. One slot, which every load finds used before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faulty import FILE, TIMEOUT, give_wish
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import (
    configuration,
    exact,
    listing,
    load,
    serving,
    settled,
    submit,
    unload,
)
from tests.server.live import Server

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(600)]

TIMEOUT_S = 1.0
A, B = (Kind(((name, 1.0, None, None),)) for name in "ab")

FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"point": "read", "after": 1, "error": "files"}, "server", "cannot read the files"),
    ({"point": "pack", "after": 0, "error": "memory"}, "server", "no memory"),
    ({"point": "fill", "after": 5, "error": "bug"}, "server", "Injected: a bug"),
    ({"point": "half", "after": 0, "error": "adapter"}, "adapter", "broken"),
    ({"slow_s": 2.5 * TIMEOUT_S}, "server", "did not answer within 1 s"),
]


@pytest.fixture(scope="module")
def wished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that says what goes wrong."""
    return tmp_path_factory.mktemp("faults") / "wish.json"


@pytest.fixture(scope="module")
def faulty(
    models: Path, folders: dict[str, Path], wished: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """No companions, one slot."""
    config = configuration(models, tmp_path_factory.mktemp("state"), max_loaded=1)
    del config["streams"], config["profiles"]
    environ = {FILE: str(wished), TIMEOUT: str(TIMEOUT_S)}
    prefix = (sys.executable, "-m", "tests.faulty")
    with serving(Server(models, config, environ=environ, prefix=prefix)) as found:
        yield found


@pytest.mark.parametrize(("wish", "fault", "reason"), FAULTS)
def test_a_load_that_failed_is_whole_when_it_is_posted_again(
    faulty: Server, folders: dict[str, Path], wished: Path, oracle: Oracle,
    wish: dict[str, Any], fault: str, reason: str,
) -> None:  # fmt: skip
    load(faulty, "a", folders["a"])
    exact(faulty, A.body({}), oracle(A))
    unload(faulty, "a")
    give_wish(wished, wish)
    assert submit(faulty, "b", folders["b"]).status_code == 202
    record = settled(faulty, "b")
    wished.unlink()
    assert (record["state"], record["fault"]) == ("failed", fault), record
    assert reason in record["reason"]
    assert faulty.post("/v1/completions", B.body({})).status_code == 404
    assert listing(faulty)["engine"]["taken"] == 0
    load(faulty, "b", folders["b"])
    exact(faulty, B.body({}), oracle(B))
    unload(faulty, "b")


def test_a_request_whose_adapter_the_engine_cannot_load_gets_503_and_the_next_its_answer(
    faulty: Server, folders: dict[str, Path], wished: Path, oracle: Oracle
) -> None:
    load(faulty, "b", folders["b"])
    load(faulty, "a", folders["a"])
    for wish, fault, reason in FAULTS:
        exact(faulty, A.body({}), oracle(A))  # takes the slot
        give_wish(wished, wish)
        answer = faulty.post("/v1/completions", B.body({}))
        wished.unlink()
        status = 503 if fault == "server" else 422
        assert answer.status_code == status and reason in answer.text, answer.text
        assert ("retry-after" in answer.headers) == (status == 503)
        exact(faulty, B.body({}), oracle(B))
    for name in "ab":
        unload(faulty, name)


def test_vllms_own_call_says_whose_fault_it_is(
    faulty: Server, folders: dict[str, Path], wished: Path, oracle: Oracle
) -> None:
    for (wish, _, reason), status in zip(FAULTS[1:4], (503, 500, 422), strict=True):
        give_wish(wished, wish)
        body = {"lora_name": "b", "lora_path": str(folders["b"])}
        answer = faulty.post("/v1/load_lora_adapter", body)
        wished.unlink()
        assert answer.status_code == status and reason in answer.text, answer.text
    load(faulty, "b", folders["b"])
    exact(faulty, B.body({}), oracle(B))
    unload(faulty, "b")
