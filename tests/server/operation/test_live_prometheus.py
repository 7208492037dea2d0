"""A real Prometheus with our configuration reads a real server: the alert rules and every query of
the dashboard are evaluated.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.monitoring import ALERTS, SCRAPING, about_gpus, queries, rules, tool
from tests.server.live import Server, free_port
from tests.server.operation.test_live_telemetry import BODY, STEERED, complete
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

EVERY_S = 1
"""Between two looks at the server, in place of the file's 15 s."""


@contextmanager
def prometheus(folder: Path, server: Server) -> Iterator[str]:
    """Its address, once it answers."""
    settings = yaml.safe_load(SCRAPING.read_text())
    settings["global"] = {f"{what}_interval": f"{EVERY_S}s" for what in ("scrape", "evaluation")}
    settings["rule_files"] = [str(ALERTS)]
    (job, _) = settings["scrape_configs"]
    del settings["alerting"]
    key = folder / "metrics_key"
    key.write_text(str(server.config["auth"]["metrics_key"]))
    job["authorization"] = {"credentials_file": str(key)}
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    command = [tool("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder}/data",
               f"--web.listen-address={address}"]  # fmt: skip
    log = folder / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"http://{address}/-/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(ready)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def asked(url: str, path: str, **options: str) -> Any:
    """What Prometheus's API answers."""
    answer = httpx.get(f"{url}/api/v1/{path}", params=options, timeout=30)
    assert answer.status_code == 200, (path, options, answer.text)
    return answer.json()["data"]


def test_prometheus_reads_the_server_and_evaluates_everything(
    operated: Server, tmp_path: Path
) -> None:
    with prometheus(tmp_path, operated) as url:
        until(lambda: asked(url, "query", query='up{job="coxswain"} == 1')["result"])
        complete(operated, STEERED)
        complete(operated, {**BODY, "model": "b"})
        # RateLimits need some looks at what has changed.
        time.sleep(5 * EVERY_S)
        found = until(lambda: evaluated(url))
        assert {rule["name"]: (rule["health"], rule["state"]) for rule in found} == {
            rule["alert"]: ("ok", "inactive") for rule in rules()
        }
        ours = [(where, query) for where, query in queries() if not about_gpus(query)]
        empty = {where for where, query in ours if not result(url, query)}
    # An alert's query finds something only where there is trouble.
    assert empty <= {rule["alert"] for rule in rules()}, empty


def evaluated(url: str) -> list[dict[str, Any]]:
    """The rules, once each was evaluated."""
    found = [rule for group in asked(url, "rules")["groups"] for rule in group["rules"]]
    return found if all(rule["health"] != "unknown" for rule in found) else []


def result(url: str, query: str) -> list[Any]:
    """What a query finds, with the dashboard's variables at `All`."""
    query = re.sub(r"\$(instance|method|profile|adapter)\b", ".*", query)
    found: list[Any] = asked(url, "query", query=query)["result"]
    return found
