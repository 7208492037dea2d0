"""The wall clock of a server, its engine and its Redis jumps; whatever waits or counts goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from tests.faults.asking import KINDS, NAMED, Beside, Listener, answering
from tests.faults.clock import Clock
from tests.faults.conftest import FEW
from tests.faults.supervisor import Supervisor
from tests.faults.table import RIGHT, Row
from tests.redis_server import RedisServer
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import exact, load, record_of, unload
from tests.server.live import Server
from tests.server.operation.test_live_telemetry import value

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(600)]

HOUR_S = 3600
V0 = Kind((("v0", 1.0, None, None),))


def asks(server: Server, fault: str) -> tuple[int, int]:
    """The status of a request of a key that may ask three times a minute, and its Retry-After."""
    headers = {"authorization": f"Bearer {FEW[fault]}"}
    answer = server.post("/v1/completions", Kind().body({}), headers=headers)
    return answer.status_code, int(answer.headers.get("retry-after", 0))


def goes_wrong_by(server: Server, redis: RedisServer, offset_s: int) -> bool:
    """Whether server, engine and Redis all have the clock."""
    for process in (server.process.pid, server.engine_process(), redis.pid):
        assert "clock.so" in Path(f"/proc/{process}/maps").read_text()
    for verb in ("pin", "unpin"):
        assert server.post(f"/admin/adapters/b/{verb}", {}).status_code == 200
    with Redis(unix_socket_path=str(redis.socket)) as client:
        now_s = client.time()
    assert isinstance(now_s, tuple)
    seen = (record_of(server, "b")["changed"], now_s[0])
    return all(abs(each - time.time() - offset_s) < 60 for each in seen)


@pytest.mark.parametrize(
    ("fault", "begin_s", "end_s"),
    [("clock-ahead", 0, HOUR_S), ("clock-back", HOUR_S, -HOUR_S)],
)
def test_a_clock_that_jumps_changes_nothing_for_anybody(
    supervised: Supervisor, clock: Clock, clocked_redis: RedisServer, folders: dict[str, Path],
    oracle: Oracle, long_oracle: Oracle, fault: str, begin_s: int, end_s: int,
    noted: Callable[[str], Row],
) -> None:  # fmt: skip
    row, server = noted(fault), supervised.server
    oracle(V0)
    clock.set(begin_s)
    assert goes_wrong_by(server, clocked_redis, begin_s)
    before = answering(server, oracle)
    assert [asks(server, fault)[0] for _ in range(4)] == [200, 200, 200, 429]
    running = [Listener(server, kind, long_oracle) for kind in KINDS[:3]]
    with Beside(server, oracle) as users:
        for one in running:
            one.start()
        for one in running:
            assert one.heard is not None and one.heard.begun.wait(60)
        clock.set(end_s)
        jumped_s = time.monotonic()
        for one in running:
            one.join()
        assert goes_wrong_by(server, clocked_redis, end_s)
        load(server, "later", folders["v0"])
        exact(server, V0.body({"v0": "later"}), oracle(V0))
        row.normal_s = time.monotonic() - jumped_s
        # A window may end early, and a caller then begins another; it must not last an hour.
        status, retry_s = asks(server, fault)
        assert (status, retry_s) == (200, 0) if end_s > begin_s else status == 429, retry_s
        assert retry_s <= 60
        time.sleep(4)  # the registry looks at leases every 3 s
        assert server.get("/ready").status_code == 200
        assert value(server, "coxswain_registry_up") == 1
        assert value(server, "coxswain_rates_local") == 0
        assert supervised.ends == []
        unload(server, "later")
    for one in running:
        assert one.label == RIGHT, (one.label, one.error)
        row.saw["of them streams across the jump"] += 1
        row.saw[RIGHT] += 1
    users.into(row)
    assert set(row.saw) == {RIGHT, "of them streams across the jump"}, row.saw
    row.loses("adapters", before, answering(server, oracle))
    assert before == set(NAMED)
    assert "Traceback" not in server.log.read_text()
    clock.set(0)
