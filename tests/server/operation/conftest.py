"""One server with everything that operators may turn on, a Redis, and a collector of traces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.make import make_lora
from tests.redis_server import RedisServer
from tests.server.adapting.kit import configuration, serving
from tests.server.live import Server
from tests.server.operation.collector import Collector

KEYS = {"free": "key-of-all", "slow": "key-of-three", "small": "key-of-forty", "admin": "admin",
        "metrics": "key-of-prometheus"}  # fmt: skip


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    with Collector().running() as found:
        yield found


@pytest.fixture(scope="package")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A redis-server of the operator's."""
    found = RedisServer(tmp_path_factory.mktemp("operation-redis"))
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="package")
def operated(
    models: Path, redis: RedisServer, collector: Collector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:  # fmt: skip
    """`test_live_z_end.py`, the last to use it, drains it."""
    state = tmp_path_factory.mktemp("operation")
    sources = {name: make_lora(state / "from" / name, models / "base", seed=50 + i)
               for i, name in enumerate(("a", "b", "c"))}  # fmt: skip
    preload = [{"name": name, "source": str(source), "pin": name == "a"}
               for name, source in sources.items()]  # fmt: skip
    config = configuration(models, state, roots=[str(state / "from")], max_loaded=2,
                           preload=preload, store=str(state / "store"))  # fmt: skip
    config |= {
        "registry": {"url": redis.url, "namespace": "operation"},
        "auth": {
            "api_keys": [
                KEYS["free"],
                {"key": KEYS["slow"], "requests_per_minute": 3},
                {"key": KEYS["small"], "tokens_per_minute": 40},
            ],
            "admin_key": KEYS["admin"],
            "metrics_key": KEYS["metrics"],
        },
        "limits": {
            "max_prompt_tokens": 100, "max_output_tokens": 150, "max_replies": 8,
            "request_timeout_s": 7, "body_timeout_s": 2,
        },
        "metrics": {"report_share": 1.0},
        "logging": {"format": "json", "requests": True},
        "tracing": {"endpoint": collector.endpoint, "protocol": "http/protobuf"},
    }  # fmt: skip
    config["server"] |= {
        "max_in_flight": 6, "engine_timeout_s": 3, "drain_notice_s": 1.5, "keep_alive_s": 1,
    }  # fmt: skip
    with serving(Server(models, config)) as found:
        yield found
