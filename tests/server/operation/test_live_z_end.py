"""How a server leaves a load balancer: not ready first, then no new requests, then gone."""

from __future__ import annotations

import json
import signal

import pytest

from tests.server.live import Server
from tests.server.operation.test_live_telemetry import complete
from tests.server.watch import until

pytestmark = [pytest.mark.last, pytest.mark.engine, pytest.mark.timeout(400)]


def test_it_says_that_it_is_not_ready_before_it_refuses(operated: Server) -> None:
    """The last test that uses this server: it ends here."""
    operated.process.send_signal(signal.SIGTERM)
    answer = until(lambda: a if (a := operated.get("/ready")).is_error else None, 10)
    assert answer.json()["reason"] == "the server is asked to end"
    assert complete(operated).headers["connection"] == "close"
    assert operated.process.wait(60) == 0
    last = json.loads(operated.log.read_text().splitlines()[-1])
    assert last["message"] == "ended in order"
