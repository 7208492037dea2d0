"""What the checks say of `steering.one_product`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.checks.capacity import memory
from server.checks.doctor import diagnose
from server.loading import engine_arguments
from server.settings.config import ConfigInvalid
from server.settings.file import parse
from tests.server.live import document, make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of `document`."""
    root = tmp_path_factory.mktemp("models")
    make_models(root)
    return root


def problems(models: Path, sets: Any, **engine: Any) -> list[str]:
    """What `coxswain doctor` finds."""
    engine = {**document()["engine"], **engine}
    found = document(steering={"one_product": sets}, engine=engine)
    return diagnose(parse(found, models, {})).problems


def test_the_engine_is_told_the_sets(models: Path) -> None:
    config = parse(document(steering={"one_product": [["chat", "plain"]]}), models, {})
    diagnosis = diagnose(config)
    assert diagnosis.problems == []
    told = engine_arguments(config, diagnosis)["additional_config"]["coxswain"]
    assert told["one_product"] == [["chat", "plain"]]


NAMED = (
    "steering.one_product[1]: not a stream with scores of its own (got 'chatt'); "
    "allowed: one of: chat, plain"
)


@pytest.mark.parametrize(
    ("sets", "engine", "words"),
    [
        ([["chat"], ["chatt"]], {}, NAMED),
        ([["chat", "base"]], {}, "steering.one_product[0]: not a stream with scores of its own "),
        ([["chat"]], {"tensor_parallel_size": 2},
         "engine.tensor_parallel_size: refused (got 2): steering.one_product"),
    ],
)  # fmt: skip
def test_bad_sets_are_named(models: Path, sets: Any, engine: dict[str, Any], words: str) -> None:
    assert any(words in line for line in problems(models, sets, **engine))


def test_a_set_is_a_list_of_names(models: Path) -> None:
    with pytest.raises(ConfigInvalid, match="one_product"):
        parse(document(steering={"one_product": ["chat"]}), models, {})


def test_the_copies_count_as_memory(models: Path) -> None:
    def told(sets: list[list[str]]) -> str:
        engine = {**document()["engine"], "kv_cache_memory_bytes": 1 << 50}
        config = parse(document(steering={"one_product": sets}, engine=engine), models, {})
        (line,) = memory(config, diagnose(config))
        return line

    assert told([]) != told([["chat", "plain"]] * 100)
