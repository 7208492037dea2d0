"""Models on disk for all live tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.live import make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `chat` and `plain`."""
    root = tmp_path_factory.mktemp("server-models")
    make_models(root)
    return root
