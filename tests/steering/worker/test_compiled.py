"""Compiled code: when the server hears of it, and what its key holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from steering.startup import Stage, listening
from steering.worker.streams.compiled import code_key, compiling

SETTINGS: dict[str, Any] = {
    "streams": {
        "chat": {"model": "small"},
        "early": {"on": "base", "layer": 1},
        "value": {"on": "base", "head": "value"},
    },
    "vectors": False,
    "ends": [2],
}
LORA = SimpleNamespace(compute_hash=lambda: "slots of rank 16")


def test_the_key_changes_with_what_wraps_the_layers() -> None:
    key = code_key("base", SETTINGS, None)
    assert key["stream"] == "base" and key["taps"] == [1]
    others = [
        code_key("chat", SETTINGS, None),
        code_key("base", SETTINGS, LORA),
        code_key("base", {**SETTINGS, "vectors": True}, None),
        code_key("base", {**SETTINGS, "streams": {"early": {"on": "base", "layer": 2}}}, None),
    ]
    for i, other in enumerate(others):
        assert other not in [key, *others[:i]]


def test_a_tap_of_a_twin_is_in_its_originals_layers() -> None:
    tapped = {"twin": {"same_as": "base"}, "late": {"on": "twin", "layer": 2}}
    streams = SETTINGS["streams"] | tapped
    assert code_key("base", {**SETTINGS, "streams": streams}, None)["taps"] == [1, 2]


def test_other_streams_do_not_change_the_key() -> None:
    more = {**SETTINGS["streams"], "large": {"model": "large"}, "twin": {"same_as": "base"}}
    changed = {**SETTINGS, "streams": more, "ends": [2, 3]}
    assert code_key("base", changed, LORA) == code_key("base", SETTINGS, LORA)


class Part(nn.Module):
    """As vLLM decorates what it compiles."""

    def __init__(self, *, kept: bool = False, never: bool = False) -> None:
        super().__init__()
        self.do_not_compile, self.compiled = never, False
        self.was_aot_compile_fn_loaded_from_disk, self.kept = False, kept

    def forward(self) -> None:
        self.compiled, self.was_aot_compile_fn_loaded_from_disk = not self.kept, self.kept


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (Part(), ["compiling", "compiled"]),
        (Part(kept=True), ["compiling"]),
        (Part(never=True), []),
    ],
)
def test_only_code_that_is_made_is_told_of(part: Part, told: list[str]) -> None:
    found: list[Stage] = []
    model = nn.Sequential(part)
    with listening(found.append):
        for _ in range(2):
            with compiling(model, "chat", 2, 3):
                part()
            part.compiled = True
    assert [stage.doing for stage in found] == told
    assert all((s.stream, s.number, s.count) == ("chat", 2, 3) for s in found)
