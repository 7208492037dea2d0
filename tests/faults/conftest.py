"""One server for the faults that it survives, one under a supervisor, and the table of the facts.

`make faults` writes the table once all of them have passed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.sources.servers import Server as Web
from tests.faults.asking import KINDS, NAMED
from tests.faults.clock import Clock
from tests.faults.proxy import Proxy
from tests.faults.supervisor import Supervisor
from tests.faults.table import FAULTS, Row, into
from tests.redis_server import RedisServer
from tests.server.adapting.expected import Oracle, make_adapters
from tests.server.adapting.kit import configuration, load_all, serving
from tests.server.live import Server, free_port, make_models

STORE_BYTES = 8 << 20
"""Of the file system that the store lies on, where this can have one of its own."""

LONG = 220
"""Tokens of a stream that something can happen to."""

KEYS = {"all": "key-of-all", "admin": "key-of-admin"}
FEW = {fault: f"key-of-{fault}" for fault in FAULTS}
"""Keys that may ask three times a minute, one for each fault."""

_rows: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that writes the page."""
    parser.addoption("--faults-table", type=Path, help="a page to write the facts into")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes into the page; not from a run in which something failed."""
    path = session.config.getoption("--faults-table", None)
    if path is not None and exitstatus == 0:
        path.write_text(into(path.read_text("utf-8"), _rows), "utf-8")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Shows the facts of every run."""
    if _rows:
        terminalreporter.section("faults")
    for row in _rows:
        terminalreporter.line(" | ".join(row.cells()))


@pytest.fixture
def noted() -> Iterator[Callable[[str], Row]]:
    """Makes the row of a fault; it is kept if the test goes through."""
    made: list[Row] = []

    def row(fault: str) -> Row:
        assert fault in FAULTS
        made.append(Row(fault))
        return made[-1]

    yield row
    _rows.extend(row for row in made if row.normal_s is not None)


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `chat` and `plain`."""
    root = tmp_path_factory.mktemp("faults-models")
    make_models(root)
    return root


@pytest.fixture(scope="package")
def folders(models: Path) -> dict[str, Path]:
    """Adapters by name."""
    return make_adapters(models / "adapters", models)


@pytest.fixture(scope="package")
def oracle(models: Path, folders: dict[str, Path]) -> Oracle:
    """The right answers; those that every test needs are computed."""
    found = Oracle(models, folders)
    for kind in (*KINDS, *NAMED.values()):
        found(kind)
    return found


@pytest.fixture(scope="package")
def long_oracle(models: Path, folders: dict[str, Path]) -> Oracle:
    """The right answers of `LONG` tokens."""
    return Oracle(models, folders, tokens=LONG)


@pytest.fixture(scope="package")
def web() -> Iterator[Web]:
    """A web server that the server may load from; tests add its answers."""
    with Web({}).running() as found:
        yield found


@pytest.fixture(scope="package")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The first server's Redis."""
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    found.start()
    yield found
    found.stop()


@pytest.fixture(scope="package")
def proxy(redis: RedisServer) -> Iterator[Proxy]:
    """What stands between the two."""
    with Proxy(redis.socket).running() as found:
        yield found


@dataclass(frozen=True)
class Place:
    """Where the store of the first server lies.

    Args:
        folder: as the server's configuration names it.
        prefix: a command that gives the server a file system of its own there; else empty.
        reason: why it has none.
    """

    folder: Path
    prefix: tuple[str, ...] = ()
    reason: str = ""

    def seen(self, server: Server) -> Path:
        """The store as the server sees it."""
        if not self.prefix:
            return self.folder
        return Path(f"/proc/{server.process.pid}/root{self.folder}")


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A small file system in a mount namespace that ends with the server, where it may be had."""
    folder = tmp_path_factory.mktemp("store")
    mount = f'mount -t tmpfs -o size={STORE_BYTES},mode=700 tmpfs {folder} && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", mount, "sh")
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, timeout=20)
    except OSError as error:
        return Place(folder, reason=str(error))
    if tried.returncode != 0:
        return Place(folder, reason=tried.stderr.strip())
    return Place(folder, prefix)


@pytest.fixture(scope="package")
def server(
    models: Path, folders: dict[str, Path], proxy: Proxy, place: Place, web: Web,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:  # fmt: skip
    """Survives its faults: `a`, `b`, `pack` and, on `chat`, `f` are there; tests leave them so."""
    config = configuration(
        models, tmp_path_factory.mktemp("state"), store=str(place.folder), remotes=[web.url]
    )
    few = [{"key": key, "requests_per_minute": 3} for key in FEW.values()]
    config |= {
        "registry": {"url": proxy.url, "namespace": "faults"},
        "auth": {"api_keys": [KEYS["all"], *few], "admin_key": KEYS["admin"]},
        # So many that nobody meets them; but each request is counted in Redis.
        "limits": {"requests_per_minute": 10**9, "tokens_per_minute": 10**9, "body_timeout_s": 4},
    }
    with serving(Server(models, config, prefix=place.prefix)) as found:
        load_all(found, folders)
        yield found
    said = found.log.read_text()
    assert "Traceback" not in said, said


@pytest.fixture(scope="package")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    """The wall clock of the second server, its engine and its Redis."""
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="package")
def clocked_redis(clock: Clock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis with that clock."""
    found = RedisServer(tmp_path_factory.mktemp("clocked-redis"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clock.environ.items():
            patch.setenv(name, value)
        found.start()
    yield found
    found.stop()


@pytest.fixture(scope="package")
def supervised(
    models: Path, folders: dict[str, Path], clock: Clock, clocked_redis: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Supervisor]:  # fmt: skip
    """Is started again whenever it ends; has the same adapters."""
    state = tmp_path_factory.mktemp("supervised")
    config = configuration(models, state, store=str(state / "store"))
    few = [{"key": key, "requests_per_minute": 3} for key in FEW.values()]
    config |= {
        "registry": {"url": clocked_redis.url, "namespace": "faults"},
        "auth": {"api_keys": [KEYS["all"], *few], "admin_key": KEYS["admin"]},
        "limits": {"requests_per_minute": 10**9, "request_timeout_s": 120},
        "logging": {"requests": True},
    }
    port = free_port()
    found = Supervisor(lambda: Server(models, config, port=port, environ=clock.environ))
    try:
        found.server.wait_ready()
        load_all(found.server, folders)
        yield found
    finally:
        found.stop()
