"""What the checks say of `steering.speculation`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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


def problems(models: Path, speculation: dict[str, Any], **engine: Any) -> list[str]:
    """What `coxswain doctor` finds."""
    engine = {**document()["engine"], **engine}
    found = document(steering={"speculation": speculation}, engine=engine)
    return diagnose(parse(found, models, {})).problems


def test_a_stream_of_its_own_may_draft(models: Path) -> None:
    assert problems(models, {"draft": "chat", "tokens": 3}) == []


def test_the_engine_is_told_which_stream_drafts(models: Path) -> None:
    speculation = {"draft": "plain", "tokens": 3}
    config = parse(document(steering={"speculation": speculation}), models, {})
    arguments = engine_arguments(config, diagnose(config))
    assert arguments["additional_config"]["coxswain"]["draft"] == "plain"
    assert arguments["speculative_config"]["num_speculative_tokens"] == 3


CHATT = (
    "steering.speculation.draft: not a stream with a language model of its own (got 'chatt'); "
    "allowed: one of: chat, plain"
)


@pytest.mark.parametrize(
    ("speculation", "engine", "words"),
    [
        ({"draft": "chatt"}, {}, CHATT),
        ({"draft": "twin"}, {}, "steering.speculation.draft: not a stream"),
        ({"draft": "base"}, {}, "steering.speculation.draft: not a stream"),
        ({"draft": "chat"}, {"max_model_len": 5}, "steering.speculation.tokens: 4 drafts do not"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(
    models: Path, speculation: dict[str, Any], engine: dict[str, Any], words: str
) -> None:
    assert any(line.startswith(words) for line in problems(models, speculation, **engine))


@pytest.mark.parametrize("tokens", [0, 17, "many"])
def test_the_number_of_drafts_has_a_range(models: Path, tokens: Any) -> None:
    with pytest.raises(ConfigInvalid, match=r"steering\.speculation\.tokens"):
        problems(models, {"draft": "chat", "tokens": tokens})


def test_vllms_own_speculation_is_refused(models: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"use `steering\.speculation`"):
        problems(models, {"draft": "chat"}, speculative_config={"model": "x"})
