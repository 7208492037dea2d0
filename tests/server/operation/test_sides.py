"""Administration on a port of its own, over real sockets; and `/metrics` without an engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from server.launch import Run
from server.loading import StartFailed
from server.operation.listening import address
from server.serving import Serving
from server.settings.config import Config, ConfigInvalid
from server.settings.file import parse

ADMIN = {"authorization": "Bearer boss-key-0123"}
ADMIN_PATHS = ["/admin/status", "/admin/drain", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
OTHER_PATHS = ["/v1/models", "/v1/completions", "/tokenize", "/playground", "/openapi.json"]
BOTH = ["/metrics", "/health", "/ready", "/ping"]


def configured(**sections: Any) -> Config:
    return parse({"model": "m", **sections}, Path("/nowhere"), {})


async def routes(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands for the routes: says which path came."""
    await JSONResponse({"path": scope["path"]})(scope, receive, send)


class _Started(Run):
    """A run whose models are there at once: everything but the engine is real."""

    ports: asyncio.Future[list[int]]

    async def _load(self, ports: list[int]) -> Serving:
        self.gate.inner = routes
        self.state.become_ready()
        self.ports.set_result(ports)
        return cast(Serving, None)

    async def _watch(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def _poll(self, serving: Serving) -> None:
        await asyncio.Event().wait()


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[list[str]]:
    """The URLs of a run's listeners."""
    run = _Started(config)
    run.ports = asyncio.get_running_loop().create_future()
    ended = asyncio.create_task(run.run())
    ports = await asyncio.wait_for(run.ports, 20)
    try:
        yield [address(config.server, port, admin=i > 0) for i, port in enumerate(ports)]
    finally:
        run.state.drain.set()
        assert await asyncio.wait_for(ended, 20) == 0


async def statuses(url: str, paths: list[str], **options: Any) -> dict[str, int]:
    async with httpx.AsyncClient(base_url=url, **options) as web:
        return {path: (await web.get(path)).status_code for path in paths}


async def test_each_port_answers_what_is_its_own() -> None:
    auth = {"admin_key": "boss-key-0123"}
    async with running(configured(server={"port": 0, "admin_port": 0}, auth=auth)) as (main, admin):
        every = [*ADMIN_PATHS, *OTHER_PATHS, *BOTH]
        on_main = await statuses(main, every, headers=ADMIN)
        on_admin = await statuses(admin, every, headers=ADMIN)
        # The key is asked for there as everywhere.
        assert (await statuses(admin, ["/admin/status"]))["/admin/status"] == 401
    assert {p for p, status in on_main.items() if status == 404} == set(ADMIN_PATHS)
    assert {p for p, status in on_admin.items() if status == 404} == set(OTHER_PATHS)
    assert all(found[path] == 200 for found in (on_main, on_admin) for path in BOTH)
    assert all(on_admin[path] == 200 for path in ADMIN_PATHS)


async def test_without_the_setting_there_is_one_port_for_all() -> None:
    async with running(configured(server={"port": 0})) as (main,):
        found = await statuses(main, [*ADMIN_PATHS, *OTHER_PATHS, *BOTH])
    assert set(found.values()) == {200}


async def test_a_path_of_the_other_port_is_an_error_like_others_with_an_id() -> None:
    async with (
        running(configured(server={"port": 0, "admin_port": 0})) as (main, _),
        httpx.AsyncClient(base_url=main) as web,
    ):
        answer = await web.get("/admin/status", headers={"x-request-id": "mine"})
    assert answer.status_code == 404 and answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["message"] == "No such path on this port: /admin/status"


async def test_a_root_path_is_no_way_around() -> None:
    server = {"port": 0, "admin_port": 0, "root_path": "/llm"}
    async with running(configured(server=server)) as (main, admin):
        assert await statuses(main, ["/llm/admin/status"]) == {"/llm/admin/status": 404}
        assert await statuses(admin, ["/llm/admin/status"]) == {"/llm/admin/status": 200}


async def test_beside_a_unix_socket_the_admin_port_knows_who_is_local(tmp_path: Path) -> None:
    """Behind the socket nobody is known to be local; on the port of its own callers are."""
    server = {"uds": str(tmp_path / "s"), "admin_port": 0}
    async with running(configured(server=server)) as (_, admin):
        assert (await statuses(admin, ["/admin/status"]))["/admin/status"] == 200
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "s"))
        found = await statuses("http://localhost", ["/admin/status"], transport=transport)
        assert found["/admin/status"] == 404


def test_the_two_ports_differ() -> None:
    with pytest.raises(ConfigInvalid, match="admin_port: 8000 is `port`"):
        configured(server={"admin_port": 8000})
    assert configured(server={"admin_port": 8000, "uds": "/tmp/s"}).server.admin_port == 8000


async def test_a_taken_admin_port_ends_the_start_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = configured(server={"uds": str(path), "admin_port": port})
        with pytest.raises(StartFailed, match=f"server.admin_port: cannot bind 127.0.0.1:{port}"):
            await Run(config).run()
    assert not path.exists()


class _Loading(_Started):
    """One whose models are never there."""

    async def _load(self, ports: list[int]) -> Serving:
        self.state.reason = "loading models: 3"
        self.ports.set_result(ports)
        await asyncio.Event().wait()
        raise AssertionError


async def test_metrics_tell_a_server_that_loads_from_one_that_is_gone() -> None:
    config = configured(server={"port": 0}, auth={"metrics_key": "scrape-key-0123"})
    run = _Loading(config)
    run.ports = asyncio.get_running_loop().create_future()
    ended = asyncio.create_task(run.run())
    (port,) = await asyncio.wait_for(run.ports, 20)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as web:
        assert (await web.get("/v1/models")).status_code == 503
        assert (await web.get("/metrics")).status_code == 401
        key = {"authorization": "Bearer scrape-key-0123"}
        page = await web.get("/metrics", headers=key)
        assert (await web.post("/metrics", headers=key)).status_code == 405
    run.state.drain.set()
    assert await asyncio.wait_for(ended, 20) == 0
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/plain")
    samples = [s for family in text_string_to_metric_families(page.text) for s in family.samples]
    phases = {s.labels["phase"]: s.value for s in samples if s.name == "coxswain_phase"}
    assert phases == {"starting": 1, "ready": 0, "draining": 0, "dead": 0}
    names = [(s.name, *sorted(s.labels.items())) for s in samples]
    assert len(names) == len(set(names)), "a series is there twice"
    assert "coxswain_refusals_total" in {s.name for s in samples}
