"""examples/ray_serve with two replicas: exact, replaced when one dies, gone at the end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from tests.fleet.asking import STEERED, ask_all
from tests.server.adapting.expected import Oracle
from tests.server.live import document, free_port
from tests.server.watch import until

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "ray_serve"
ADMIN = "key-of-admin"


def application(models: Path, folder: Path) -> tuple[Path, str]:
    """The shipped serve.yaml for the tiny models, and its address."""
    config = document(streams={"chat": {"model": "./chat"}, "plain": {"model": "./plain"}})
    config["profiles"] = {}
    config["engine"]["kv_cache_memory_bytes"] = 64 * 1024 * 1024
    file = models / "ray.yaml"
    file.write_text(yaml.safe_dump(config))
    settings: dict[str, Any] = yaml.safe_load((FOLDER / "serve.yaml").read_text())
    settings["http_options"]["port"] = port = free_port()
    (app,) = settings["applications"]
    app["args"]["config"] = str(file)
    (replica,) = app["deployments"]
    assert replica["num_replicas"] == 2
    replica["ray_actor_options"]["num_cpus"] = 0.5
    shown = folder / "serve.yaml"
    shown.write_text(yaml.safe_dump(settings))
    return shown, f"http://127.0.0.1:{port}"


@contextmanager
def running(file: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """`serve run` of a file, ready."""
    command = shutil.which("serve", path=str(Path(sys.executable).parent))
    assert command is not None
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "COXSWAIN_"))}
    environ |= {
        "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}",
        "COXSWAIN_ADMIN_KEY": ADMIN,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = file.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [command, "run", str(file)], env=environ, stdout=output, stderr=output
        )

    def failed() -> bool:
        return "' failed with exception" in log.read_text()

    try:
        until(lambda: process.poll() is not None or failed() or ready(url), 400)
        assert process.poll() is None and ready(url), log.read_text()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(120)


def ready(url: str) -> bool:
    """Whether Serve passes requests on."""
    try:
        return httpx.get(f"{url}/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def servers(file: str) -> dict[int, str]:
    """The servers of a configuration: process id → address."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "server.main" in line and file in line:
            found[process.pid] = f"http://127.0.0.1:{line[line.index('--port') + 1]}"
    return found


def answered(address: str) -> int:
    """Completions that a server has answered with 200."""
    text = httpx.get(f"{address}/metrics", timeout=30).text
    counts = re.findall(r'^coxswain_requests_total\{.*status="200".*\} (\S+)$', text, re.MULTILINE)
    return int(sum(float(count) for count in counts))


def in_flight(address: str) -> int:
    """Requests that a server is answering."""
    found: int = httpx.get(f"{address}/health", timeout=30).json()["in_flight"]
    return found


def test_two_replicas_behind_ray_serve(models: Path, oracle: Oracle, tmp_path: Path) -> None:
    file, url = application(models, tmp_path)
    config = str(models / "ray.yaml")
    with running(file, url):
        found = until(lambda: len(s := servers(config)) == 2 and s, 60)
        assert isinstance(found, dict)
        both = list(found.values())
        until(lambda: all(map(ready, both)), 240)
        until(lambda: reached(url, both), 60)
        spread(url, oracle, both)
        the_admin_api_wants_its_key(url)
        a_client_that_leaves_ends_its_request(url, both)
        a_dead_one_is_replaced(url, oracle, config, next(iter(found)))
    until(lambda: not servers(config), 60)


def reached(url: str, both: list[str]) -> bool:
    """Asks once; whether Serve has sent requests to each by now. It learns late who is ready."""
    answer = httpx.post(f"{url}/v1/completions", json=STEERED[0].body({}), timeout=60)
    assert answer.status_code == 200, answer.text
    return min(map(answered, both)) > 0


def spread(url: str, oracle: Oracle, both: list[str]) -> None:
    """Both answer, rightly."""
    before = list(map(answered, both))
    load = ask_all(url, oracle, STEERED, rounds=8)
    shares = [answered(address) - old for address, old in zip(both, before, strict=True)]
    assert sum(shares) == load.answers and min(shares) > 0, shares
    print(
        f"\nbehind Ray Serve: {load.answers} answers, {shares[0]} + {shares[1]}, largest error "
        f"{load.error:.1e} nats, {load.seconds:.1f} s"
    )
    wrong = httpx.post(f"{url}/v1/completions", json={"model": "nobody", "prompt": "x"}, timeout=60)
    assert wrong.status_code == 404 and "nobody" in wrong.json()["error"]["message"]


def the_admin_api_wants_its_key(url: str) -> None:
    """Although each server is bound to loopback."""
    status = f"{url}/admin/status"
    assert httpx.get(status, timeout=60, headers={"host": "127.0.0.1"}).status_code == 401
    key = {"authorization": f"Bearer {ADMIN}"}
    assert httpx.get(status, timeout=60, headers=key).json()["status"] == "ready"


def a_client_that_leaves_ends_its_request(url: str, both: list[str]) -> None:
    """And not only the stream between Serve and it."""
    body = {"model": "big", "prompt": [11, 40, 7], "max_tokens": 250, "ignore_eos": True,
            "stream": True}  # fmt: skip
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # dropped, it would close the connection
        next(lines)
        assert sum(map(in_flight, both)) == 1
    begun = time.monotonic()
    until(lambda: sum(map(in_flight, both)) == 0, 30)
    print(f"a client that left was noticed after {time.monotonic() - begun:.2f} s")


def a_dead_one_is_replaced(url: str, oracle: Oracle, config: str, victim: int) -> None:
    """Requests meanwhile are answered by the other one, or refused with a status."""
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    refused = 0

    def look() -> bool:
        nonlocal refused
        status = httpx.post(
            f"{url}/v1/completions", json=STEERED[0].body({}), timeout=120
        ).status_code
        assert status in (200, 503), status
        refused += status == 503
        now = servers(config)
        return len(now) == 2 and victim not in now and all(map(ready, now.values()))

    until(look, 300)
    print(f"a killed server was replaced after {time.monotonic() - begun:.1f} s; "
          f"{refused} requests got 503")  # fmt: skip
    ask_all(url, oracle, STEERED, rounds=2)
