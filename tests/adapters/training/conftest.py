"""One running server for the recipes that sample."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.live import TEMPLATE, Server, document, make_models

KEY = "a-key-for-the-tests-only"


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A base with companions, a profile `big-chat`, and a key."""
    folder = tmp_path_factory.mktemp("sampled")
    make_models(folder)
    auth = {"api_keys": [KEY], "admin_key": "another-key-for-the-tests"}
    found = Server(folder, document(auth=auth, chat={"template": TEMPLATE}))
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()
