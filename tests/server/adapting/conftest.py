"""One server for the tests that do not end it, with some adapters to load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adapters.sources.servers import Server as Web
from tests.server.adapting.expected import Oracle, make_adapters
from tests.server.adapting.kit import configuration, load_all, serving
from tests.server.live import Server


@pytest.fixture(scope="session")
def folders(models: Path) -> dict[str, Path]:
    """Adapters by name."""
    return make_adapters(models / "adapters", models)


@pytest.fixture(scope="session")
def oracle(models: Path, folders: dict[str, Path]) -> Oracle:
    """The right answers."""
    return Oracle(models, folders)


@pytest.fixture(scope="session")
def web() -> Iterator[Web]:
    """A web server that the servers may load from; tests add its answers."""
    with Web({}).running() as found:
        yield found


@pytest.fixture(scope="package")
def live(
    models: Path, folders: dict[str, Path], web: Web, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Four slots. `a`, `b`, `pack` and, on `chat`, `f` are there; tests leave them so."""
    state = tmp_path_factory.mktemp("state")
    config = configuration(models, state, remotes=[web.url])
    with serving(Server(models, config)) as found:
        load_all(found, folders)
        yield found
