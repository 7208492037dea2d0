"""Models on disk, adapters for them, and the right answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.adapting.expected import Oracle, make_adapters
from tests.server.live import make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `chat` and `plain`."""
    root = tmp_path_factory.mktemp("fleet-models")
    make_models(root)
    return root


@pytest.fixture(scope="session")
def folders(models: Path) -> dict[str, Path]:
    """Adapters by name."""
    return make_adapters(models / "adapters", models)


@pytest.fixture(scope="session")
def oracle(models: Path, folders: dict[str, Path]) -> Oracle:
    """The right answers."""
    return Oracle(models, folders)
