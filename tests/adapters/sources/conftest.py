"""A fetcher with a store of its own, and a web server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.sources.fetch import Fetcher
from adapters.sources.source import Allowed
from adapters.sources.store import ContentStore
from tests.adapters.sources.fetching import QUICK
from tests.adapters.sources.servers import (
    Server,
)


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    remotes = ("http://127.0.0.1", "hf://acme", "s3://adapters")
    return Fetcher(ContentStore(tmp_path / "store"), Allowed((tmp_path / "in",), remotes), QUICK)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server({}).running() as found:
        yield found
