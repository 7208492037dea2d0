"""Every kind of Redis that an address may name: in words, and as real processes."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from adapters.errors import RegistryAway
from adapters.registry.address import Address, BadAddress, parse_address
from adapters.registry.connection import open_store
from adapters.registry.feed import Feed
from adapters.registry.record import Content
from adapters.registry.registry import Registry
from tests.adapters.registry.kit import all_records, make_lora, replica, until
from tests.redis_server import RedisServer, SentinelServer, free_port


def test_addresses_are_read() -> None:
    for text, found in (
        ("redis://h", Address("server", (("h", 6379),))),
        ("rediss://u:p%40@h:1/2", Address("server", (("h", 1),), tls=True, database=2, user="u",
                                          password="p@")),
        ("redis://:p@[::1]:7", Address("server", (("::1", 7),), password="p")),
        ("unix:///a/b.sock", Address("unix", path="/a/b.sock")),
        ("redis+sentinel://a,b:2/main/3", Address("sentinel", (("a", 26379), ("b", 2)),
                                                  service="main", database=3)),
        ("rediss+cluster://a:1,b", Address("cluster", (("a", 1), ("b", 6379)), tls=True)),
    ):  # fmt: skip
        assert parse_address(text) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://h", "not an address of a Redis; allowed: redis://host:port/database"),
        ("h:6379", "not an address of a Redis"),
        ("redis://", "a host is name or name:port"),
        ("redis://h:0", "a port from 1 to 65535"),
        ("redis://a,b", "several hosts need redis"),
        ("redis://h/x", "a database is a number"),
        ("redis://secret@h", "a login is user:password"),
        ("redis://h?ssl=1", "options behind"),
        ("redis+sentinel://h:1", "behind the Sentinels stands the service's name"),
        ("redis+cluster://h/1", "a cluster has one database"),
        ("unix://h/x", "a unix socket is unix:///path"),
    ],
)
def test_other_texts_are_refused_without_showing_a_password(text: str, said: str) -> None:
    with pytest.raises(BadAddress, match=said) as refused:
        parse_address(text)
    assert "secret" not in str(refused.value)


async def works(address: Address) -> None:
    """A registry there takes writes and tells of them."""
    async with open_store(address) as mine, open_store(address) as other:
        told: list[list[str]] = []
        feed, admin = Feed(mine, "me", told.append), Registry(other, "you")
        running = asyncio.create_task(feed.run())
        await until(lambda: feed.away is None)
        job = await admin.submit(Content("a", "1", "/a"), pin=True, most_pins=1)
        await until(lambda: "a" in feed.records, 2)  # by the hint
        assert feed.records == await all_records(other) and feed.pinned == {"a"}
        await other.tell_progress("a", job.job, 5)
        assert await mine.progress({"a": job.job, "b": "x"}) == {"a": 5}
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await feed.leave()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[RedisServer, ...]]:
    """Three nodes, each with a third of the slots."""
    nodes = [
        RedisServer(tmp_path / f"node{i}", free_port(), cluster_enabled="yes",
                    cluster_node_timeout="2000")
        for i in range(3)
    ]  # fmt: skip
    try:
        for i, node in enumerate(nodes):
            node.start()
            with node.client() as client:
                slots = range(i * 5462, min((i + 1) * 5462, 16384))
                client.execute_command("CLUSTER", "ADDSLOTS", *slots)
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        yield tuple(nodes)
    finally:
        for node in nodes:
            node.stop()


async def test_a_cluster(cluster: tuple[RedisServer, ...]) -> None:
    for node in cluster:
        with node.client() as each:
            for _ in range(500):
                if "cluster_state:ok" in raw_info(each):
                    break
                await asyncio.sleep(0.02)
            else:
                raise AssertionError(raw_info(each))
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in cluster[:2])
    await works(parse_address(f"redis+cluster://{hosts}"))


def raw_info(client: Redis) -> str:
    """What a node says of its cluster."""
    client.response_callbacks.pop("CLUSTER INFO", None)
    found = client.execute_command("CLUSTER INFO")
    return found.decode() if isinstance(found, bytes) else str(found)


async def test_a_master_behind_a_sentinel_that_dies(tmp_path: Path) -> None:
    """The registry goes on with the replica that takes over; who serves notices nothing."""
    make_lora(tmp_path / "in/a", 1.0)
    make_lora(tmp_path / "in/b", 2.0)
    master = RedisServer(tmp_path / "master", free_port())
    second = RedisServer(tmp_path / "second", free_port(), replicaof=f"127.0.0.1 {master.port}")
    sentinel = SentinelServer(tmp_path / "sentinel", free_port(), "main", master.port)
    try:
        for each in (master, second, sentinel):
            each.start()
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
        await works(parse_address(url))
        with sentinel.client() as client:
            for _ in range(1500):
                state = client.sentinel_master("main")
                if int(state["num-slaves"]) == 1:
                    break
                await asyncio.sleep(0.01)
        async with replica(url, "x", tmp_path / "in", tmp_path / "store") as r:
            await r.manager.submit("a", str(tmp_path / "in/a"))
            await until(lambda: r.answers("a") == 1.0)
            with second.client() as client:
                for _ in range(500):
                    if client.hexists("{x}:records", "a"):
                        break
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(master.stop)
            await until(lambda: r.manager.feed.away is not None, 20)
            await until(lambda: r.manager.feed.away is None, 30)
            assert r.answers("a") == 1.0
            await r.manager.submit("b", str(tmp_path / "in/b"))
            await until(lambda: r.answers("b") == 2.0)
            with second.client() as client:
                assert client.hlen("{x}:records") == 2
    finally:
        for each in (sentinel, second, master):
            each.stop()


def make_certificate(folder: Path) -> None:
    """A certificate for localhost, which is its own authority, and its key."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem",
         "-out", folder / "ca.pem"],
        check=True, capture_output=True,
    )  # fmt: skip


@asynccontextmanager
async def encrypted(server: RedisServer, folder: Path) -> AsyncIterator[int]:
    """A port that takes TLS for a server, with a certificate that no system trusts."""
    await asyncio.to_thread(make_certificate, folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_unix_connection(server.socket)
        await asyncio.gather(pump(reader, outer), pump(inner, writer), return_exceptions=True)

    listening = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    try:
        yield int(listening.sockets[0].getsockname()[1])
    finally:
        listening.close()


async def test_tls_and_passwords(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    server.start()
    try:
        with server.client() as client:
            client.config_set("requirepass", "p@ss")
        async with encrypted(server, tmp_path) as port:
            plain = parse_address(f"rediss://localhost:{port}")
            trusted = replace(plain, ca_file=str(tmp_path / "ca.pem"))
            with pytest.raises(RegistryAway, match=r"certificate|CERTIFICATE"):
                await works(replace(plain, password="p@ss"))
            with pytest.raises(RegistryAway, match=r"[Aa]uthenticat|NOAUTH"):
                await works(trusted)
            await works(replace(trusted, password="p@ss"))
    finally:
        server.stop()
