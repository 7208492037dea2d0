"""Models on disk, adapters for them, and the right answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.adapting.expected import Oracle, make_adapters
from tests.server.live import make_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves these tests out unless `-m` names them, whatever else it says."""
    if "fleet" in config.option.markexpr:
        return
    found = [item for item in items if item.get_closest_marker("fleet")]
    items[:] = [item for item in items if item not in found]
    config.hook.pytest_deselected(items=found)


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
