"""The claims that the step's benchmark makes of its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from load_tests.step_bench import kinds, ratios, table, works

ONE = {
    "base": 10.0, "companion": 2.0, "steered": 12.0, "one product": 11.0, "loop": 24.0,
    "unsteered": 8.0,
}  # fmt: skip
HALF = {**ONE, "half": 12.0, "companion, half": 1.0}


def test_ratios_are_over_the_sum_of_the_streams() -> None:
    found = ratios(HALF)
    assert found["steered / sum of its streams"] == pytest.approx(12 / 14)
    assert found["in one product / sum"] == pytest.approx(11 / 14)
    assert found["times as fast as the transformers loop"] == pytest.approx(2)
    assert found["unsteered throughput / plain vLLM"] == pytest.approx(1.25)
    assert found["half steered / (base + streams on half)"] == pytest.approx(1)


def test_the_table_has_a_line_for_each_size() -> None:
    lines = table([{"1": ONE, "16": HALF}, {"1": ONE, "16": {**HALF, "steered": 15.0}}]).split("\n")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "16"]
    assert "0.96 (0.86–1.07)" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_every_column_has_its_engine(tmp_path: Path) -> None:
    engines = dict.fromkeys(kinds(tmp_path))
    columns = works(engines, [1, 16])  # type: ignore[arg-type]
    assert set(columns["1"]) == set(ONE)
    assert set(columns["16"]) == set(HALF)
