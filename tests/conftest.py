"""What tests of several folders share: one server with the zoo, a browser, what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from playwright.sync_api import Browser

from load_tests.with_server import running_server
from tests.browser import chromium

# On a busy machine a single example may take long.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of `make test-slow` unless `-m` names them, whatever else it says."""
    left = {mark for mark in ("fleet", "emulated") if mark not in config.option.markexpr}
    found = [item for item in items if any(item.get_closest_marker(mark) for mark in left)]
    if found:
        items[:] = [item for item in items if item not in found]
        config.hook.pytest_deselected(items=found)


@pytest.fixture(scope="session")
def zoo() -> Iterator[str]:
    """The address of a server with the zoo; tests leave its adapters and profiles as they were."""
    with running_server(Path(__file__).parents[1] / "zoo" / "server.yaml") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; skips where there is none."""
    with chromium() as found:
        yield found
