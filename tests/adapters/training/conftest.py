"""A run of `coxswain train critic`, and one running server for the recipes that sample."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from adapters.training.critic.settings import CriticSettings
from adapters.training.critic.train import train
from tests.adapters.training import critic_runs
from tests.server.live import TEMPLATE, Server, document, make_models

KEY = "a-key-for-the-tests-only"


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A base with companions, a profile `big-chat`, a key, and room for vectors."""
    folder = tmp_path_factory.mktemp("sampled")
    make_models(folder)
    auth = {"api_keys": [KEY], "admin_key": "another-key-for-the-tests"}
    adapters = {"roots": [str(folder)], "vectors": True, "max_loaded": 2, "max_rank": 8}
    found = Server(folder, document(auth=auth, chat={"template": TEMPLATE}, adapters=adapters))
    try:
        found.wait_ready()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> CriticSettings:
    """A body, an adapter of it, ready replies, a rule; a probe with a hidden layer, 15 steps."""
    return critic_runs.settings(tmp_path_factory.mktemp("critic"))


@pytest.fixture(scope="package")
def whole(made: CriticSettings) -> dict[str, str]:
    """The files of an uninterrupted run."""
    train(made, say=critic_runs.quiet)
    return critic_runs.bits(made.out)
