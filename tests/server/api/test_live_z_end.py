"""How a server ends: drained, cut off, refused start; a killed engine is in `tests/faults`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.server.live import Server, document
from tests.server.reading import BODY, Stream, last_line

pytestmark = [pytest.mark.last, pytest.mark.engine, pytest.mark.timeout(400)]


def test_drain_finishes_what_runs_refuses_what_comes_and_exits_0(server: Server) -> None:
    """The last test that uses the folder's server: it ends here."""
    stream = Stream(server)
    stream.start()
    assert stream.begun.wait(60)
    asked = server.post("/admin/drain", {})
    assert (asked.status_code, asked.json()) == (202, {"status": "draining", "in_flight": 1})
    # Ctrl-C on a terminal reaches the engine's process, too.
    os.killpg(server.process.pid, signal.SIGINT)
    time.sleep(0.05)
    refused = server.post("/v1/completions", {**BODY, "stream": False})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert int(refused.headers["retry-after"]) > 0
    assert server.get("/health").status_code == 200
    assert server.get("/ready").json()["status"] == "draining"
    stream.join(120)
    assert [line for line in stream.lines if line][-1] == "data: [DONE]"
    assert server.process.wait(60) == 0
    assert last_line(server) == "coxswain: ended in order"


def test_a_second_signal_cuts_off_what_runs(models: Path) -> None:
    config = document()
    config["engine"]["max_num_seqs"] = 1
    config["logging"] = {"requests": True}
    server = Server(models, config)
    try:
        server.wait_ready()
        stream = Stream(server, {**BODY, "n": 32, "temperature": 1})
        stream.start()
        assert stream.begun.wait(60)
        server.process.send_signal(signal.SIGTERM)
        while server.get("/ready").json()["status"] != "draining":
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        stream.join(30)
        assert "data: [DONE]" not in stream.lines
        last = json.loads([line for line in stream.lines if line][-1].removeprefix("data: "))
        assert last["error"]["code"] == "draining"
    finally:
        server.stop(signal.SIGKILL)
    assert last_line(server) == "coxswain: ended in order; requests cut off: 1"
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "status=503 sent_status=200 failure=draining" in log


def test_a_bad_configuration_stops_the_start_with_one_line_per_reason(models: Path) -> None:
    config = document(engine={"max_model_len": 9999, "max_modle_len": 3})
    config["streams"]["gone"] = {"model": "./gone"}
    file = models / "bad.yaml"
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "server.main", "serve", str(file)],
        capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "streams.gone: no such folder" in done.stderr
    assert "did you mean max_model_len?" in done.stderr
    assert "streams.chat: holds 512 tokens, requests may have 9999" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_while_loading_ends_in_order(models: Path) -> None:
    server = Server(models, document())
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if server.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        assert server.stop() == 0
    finally:
        server.stop(signal.SIGKILL)
