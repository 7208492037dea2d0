"""One server for the tests of this folder, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.server.live import Server, document


@pytest.fixture(scope="package")
def server(models: Path) -> Iterator[Server]:
    """A running server; `test_live_z_end.py`, the last to use it, drains it."""
    found = Server(models, document(), flags=("--max-model-len", "224"))
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)
