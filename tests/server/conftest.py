"""Models on disk and one server for all live tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import Server, document, make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `chat` and `plain`."""
    root = tmp_path_factory.mktemp("server-models")
    make_models(root)
    return root


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[Server]:
    """A running server; `test_live_end.py`, the last to use it, drains it."""
    found = Server(models, document(), flags=("--max-model-len", "224"))
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()
