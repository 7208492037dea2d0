"""`coxswain drain` against a real server, which ends."""

from __future__ import annotations

import pytest

from server.main import run
from tests.server.keyed.conftest import ADMIN, FULL
from tests.server.live import Server
from tests.server.reading import BODY, Stream

pytestmark = [pytest.mark.last, pytest.mark.engine, pytest.mark.timeout(400)]


def test_drain_waits_until_what_runs_is_finished(
    keyed: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COXSWAIN_ADMIN_KEY", ADMIN)
    stream = Stream(keyed, headers={"authorization": f"Bearer {FULL}"})
    stream.start()
    assert stream.begun.wait(60)
    assert BODY["max_tokens"] > 100, "it must still run when the server is drained"
    assert run(["drain", "--url", keyed.url]) == 0
    assert capsys.readouterr().out == "the server has ended\n"
    stream.join(10)
    assert [line for line in stream.lines if line][-1] == "data: [DONE]"
    assert keyed.process.wait(60) == 0
    assert run(["drain", "--url", keyed.url]) == 1
