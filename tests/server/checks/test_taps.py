"""Taps in the settings: what is refused, and what a server makes of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.checks.diagnosis import Diagnosis
from server.checks.doctor import snapshot
from server.checks.taps import tap_problems
from server.requests.probing import plan
from server.settings import file
from server.settings.config import ConfigInvalid
from tests.models import make_model


def parsed(folder: Path, streams: dict[str, Any]) -> Any:
    return file.parse({"model": "some/model", "streams": streams}, folder, {})


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        ({"on": "base"}, "`on` needs `layer`, or `head` and `path`"),
        ({"on": "base", "layer": -1}, "allowed: at least 0"),
        ({"on": "base", "layer": 1, "head": "classifier"}, "`layer` goes with `on`"),
        ({"same_as": "base", "layer": 1}, "`layer` goes with `on`"),
        ({"same_as": "base", "norm": True}, "`norm` goes with `layer`"),
        ({"on": "nobody", "layer": 1}, "no such stream"),
    ],
)
def test_a_wrong_tap_is_refused(tmp_path: Path, stream: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"streams\.early") as caught:
        parsed(tmp_path, {"early": stream})
    assert why in str(caught.value)


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    from server.checks.doctor import diagnose

    folder = make_model(tmp_path / "base", "llama")
    streams = {
        "last": {"on": "base", "layer": 1},
        "behind": {"on": "base", "layer": 2},
        "tapped": {"on": "last", "layer": 0},
        "twin": {"same_as": "base"},
        "of-twin": {"on": "twin", "layer": 7, "norm": False},
    }
    config = file.parse({"model": str(folder), "streams": streams}, tmp_path, {})
    diagnosis = diagnose(config)
    assert [line for line in diagnosis.problems if "streams." in line] == [
        "streams.behind.layer: base has 2 layers (got 2); allowed: 0 to 1",
        (
            "streams.tapped.on: not a language model that runs (got 'last'); "
            "allowed: one of: base, twin"
        ),
        "streams.of-twin.layer: twin has 2 layers (got 7); allowed: 0 to 1",
    ]


def test_what_methods_see_of_a_tap(tmp_path: Path) -> None:
    config = parsed(tmp_path, {"twin": {"same_as": "base"}, "early": {"on": "twin", "layer": 3}})
    found = snapshot(config)
    assert found.taps == {"early": "twin"}
    assert found.bodies == {}
    assert found.streams["early"] == "lm"
    assert tap_problems(config, Diagnosis()) == []


def test_the_first_request_tries_taps_as_well() -> None:
    sources: dict[str, Any] = {
        "other": {"model": "x"},
        "early": {"on": "other", "layer": 3, "norm": True},
    }
    probe = plan(sources)
    assert dict(probe.weights) == {"base": 1.0, "early": 1.0, "other": 1.0}
    assert probe.taps == ("early",)
    assert probe.streams == ("other",)
