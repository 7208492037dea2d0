"""What tests of several folders share: the tiers, the order, one server with the zoo, a browser."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from playwright.sync_api import Browser
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from load_tests.with_server import running_server
from tests.browser import chromium
from tests.tiers import NIGHTLY, nightly

ROOT = Path(__file__).parents[1]

# Models this small gain nothing from a second thread, and threads that wait for each other crawl
# when another worker of pytest uses the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a busy machine a single example may take long.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

ZOO = {
    "tests/test_readme.py",
    "tests/test_playground.py",
    "tests/test_scripts.py",
    "tests/load_tests/test_start_bench.py",
}
"""The files whose tests ask the fixture `zoo`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("coxswain")
    group.addoption("--nightly", action="store_true", help="also the tests marked `nightly`")
    group.addoption(
        "--order", default="written", metavar="SEED",
        help="`random`, or the number that a run in random order printed",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # xdist's workers are given the command line, not what became of it.
    config.option.order = getattr(config, "workerinput", {}).get("order", config.option.order)
    if config.option.order == "random":
        config.option.order = str(random.randrange(10**6))
    if config.option.nightly:
        os.environ[NIGHTLY] = "1"
    elif nightly():
        config.option.nightly = True


def pytest_configure_node(node: Any) -> None:
    """One order for all of xdist's workers."""
    node.workerinput["order"] = node.config.option.order


def pytest_report_header(config: pytest.Config) -> str:
    return f"order: {config.option.order} (again: --order {config.option.order})"


def unit_of(nodeid: str) -> str:
    """What one worker runs as a whole: a folder with a `conftest.py` of its own, or a file."""
    file = nodeid.partition("::")[0]
    folder = file.rpartition("/")[0]
    if file in ZOO:
        return "zoo"
    shares = folder != "tests" and (ROOT / folder / "conftest.py").exists()
    return folder if shares else file


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is `nightly`, puts units with engines first, and the rest in its order."""
    if not config.option.nightly:
        left = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
        if left:
            config.hook.pytest_deselected(items=left)
    if config.option.order != "written":
        engines = {unit_of(item.nodeid) for item in items if item.get_closest_marker("engine")}
        items.sort(key=lambda item: _place(item, config.option.order, engines))


def _place(item: pytest.Item, seed: str, engines: set[str]) -> tuple[float, ...]:
    """Where a test stands: units at random, in them files, in them tests that share no engine."""

    def draw(what: str) -> float:
        return random.Random(f"{seed} {what}").random()

    unit = unit_of(item.nodeid)
    return (
        # The longest begin first, so that workers end together.
        unit not in engines,
        draw(unit),
        item.get_closest_marker("last") is not None,
        draw(str(item.path)),
        0 if unit in engines else draw(item.nodeid),
    )


class UnitScheduling(LoadScopeScheduling):
    """Gives each worker of `pytest -n` whole units, in the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return UnitScheduling(config, log)


@pytest.fixture(scope="session")
def zoo() -> Iterator[str]:
    """The address of a server with the zoo; tests leave its adapters and profiles as they were."""
    with running_server(ROOT / "zoo" / "server.yaml") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; skips where there is none."""
    with chromium() as found:
        yield found
