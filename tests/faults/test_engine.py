"""The engine's process is killed while it streams: told, ended, started again, as before."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.faults.asking import KINDS, NAMED, Beside, Listener, answering
from tests.faults.supervisor import Supervisor
from tests.faults.table import RIGHT, Row
from tests.server.adapting.expected import Oracle
from tests.server.adapting.kit import PATIENCE_S, listing
from tests.server.live import START_S, Server
from tests.server.reading import Stream
from tests.server.watch import until

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]

LASTING = ("name", "version", "source", "stream", "state", "digest", "pinned", "created", "serving")
"""What of an adapter's record a restart does not change."""


def records(server: Server) -> list[dict[str, Any]]:
    """The registry, as a server shows it."""
    return [{key: record[key] for key in LASTING} for record in listing(server)["adapters"]]


def reasons(server: Server, over: Callable[[], bool]) -> list[str]:
    """What `/ready` says until it is over."""
    found = []
    while not over():
        try:
            answer = server.get("/ready")
            if answer.status_code == 503:
                found.append(answer.json()["reason"])
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    return found


def in_flight(server: Server, oracle: Oracle) -> tuple[list[Listener], Listener, Stream]:
    """Three streams, one request that is not streamed and one of the Responses API, all running."""
    told = {"model": "big-chat", "input": "Water", "max_output_tokens": oracle.tokens - 20,
            "stream": True}  # fmt: skip
    for _ in range(10):
        streams = [Listener(server, kind, oracle) for kind in KINDS[:3]]
        whole = Listener(server, KINDS[0], oracle, stream=False)
        responses = Stream(server, told, "/v1/responses", server.key("/v1/"))
        requests = (whole, responses, *streams)
        for request in requests:
            request.start()
        for stream in streams:
            assert stream.heard is not None and stream.heard.begun.wait(60)
        assert responses.begun.wait(60)
        if all(request.is_alive() for request in requests):
            return streams, whole, responses
        for request in requests:
            request.join()
    raise AssertionError("they never run at the same time")


def test_a_killed_engine_is_told_and_a_supervisor_brings_everything_back(
    supervised: Supervisor, oracle: Oracle, long_oracle: Oracle, noted: Callable[[str], Row]
) -> None:
    row, first = noted("engine"), supervised.server
    assert first.post("/admin/adapters/a/pin", {}).status_code == 200
    before, registered = answering(first, oracle), records(first)
    with Beside(first, oracle) as users:
        streams, whole, responses = in_flight(first, long_oracle)
        os.kill(first.engine_process(), signal.SIGKILL)
        killed_s = time.monotonic()
        said = reasons(first, lambda: bool(supervised.ends))
        for request in (whole, *streams, responses):
            request.join(60)
        second = until(lambda: s if (s := supervised.server) is not first else None, START_S)
        second.wait_ready()
        until(lambda: answering(second, oracle) == before, PATIENCE_S)
        row.normal_s = time.monotonic() - killed_s
    users.into(row)
    # Told, and never with an answer that only looks complete.
    assert [stream.label for stream in streams] == ["error event"] * 3
    assert whole.label in ("refused 500", "refused 503")
    assert "event: error" in responses.lines
    assert first.log.read_text().count("status=503 sent_status=200 failure=dead") >= 4
    row.saw["error event"] += len(streams) + 1
    row.saw[whole.label] += 1
    ends = {RIGHT, "error event", "refused 500", "refused 503", "stream broken off",
            "no connection"}  # fmt: skip
    assert set(row.saw) <= ends, row.saw
    assert any("engine process ended" in reason for reason in said)
    ((status, line),) = supervised.ends
    assert status == 1
    assert line.startswith("coxswain: engine failure") and "SIGKILL" in line
    # Nobody has loaded anything again.
    assert records(second) == registered
    row.loses("adapters", before, answering(second, oracle))
    assert before == set(NAMED)
    assert second.post("/admin/adapters/a/unpin", {}).status_code == 200
