"""One server with heads for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.heads import Headed
from tests.server.heads.headed import Slow, configuration, make_headed
from tests.server.live import Server


@pytest.fixture(scope="package")
def heads(models: Path) -> dict[str, Headed]:
    return make_headed(models)


@pytest.fixture(scope="package")
def server(models: Path, heads: dict[str, Headed]) -> Iterator[Server]:
    found = Server(models, configuration())
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()


@pytest.fixture
def slow(models: Path, heads: dict[str, Headed]) -> Slow:
    return Slow(models, heads)


@pytest.fixture
def tuned(models: Path, heads: dict[str, Headed]) -> Slow:
    return Slow(models, heads, lora=True)
