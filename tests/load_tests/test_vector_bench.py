"""What the benchmarks of vectors and taps make of their figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from load_tests import tap_bench, vector_bench
from load_tests.vectors_served import Client

VECTORS = dict.fromkeys((vector_bench.ALONE, vector_bench.LORA), 10.0)
VECTORS |= {vector_bench.FREE: 20.0, vector_bench.ONE: 21.0, vector_bench.MANY: 22.0}
TAPS = {tap_bench.PLAIN: 10.0, tap_bench.READ: 2.0, **dict.fromkeys(tap_bench.STEERING, 15.0)}


def test_a_vector_is_compared_with_no_adapters_and_with_its_own_engine() -> None:
    first, second = vector_bench.tables([{"16 rows": VECTORS}]).split("\n\n")
    assert [cell.strip() for cell in first.splitlines()[2].split("|")[2:-1]] == [
        "10.0", "1.00 (1.00–1.00)", "2.00 (2.00–2.00)", "2.10 (2.10–2.10)", "2.20 (2.20–2.20)",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.splitlines()[2].split("|")[2:-1]] == [
        "20.0", "1.05 (1.05–1.05)", "1.10 (1.10–1.10)",
    ]  # fmt: skip


def test_each_engine_has_its_columns(tmp_path: Path) -> None:
    engines = dict.fromkeys(vector_bench.kinds(tmp_path, ["a"]))
    found = vector_bench.works(engines, ["a"] * 16)  # type: ignore[arg-type]
    assert found["16 rows"].keys() == VECTORS.keys()
    assert found["1 row"].keys() == VECTORS.keys() - {vector_bench.MANY}
    assert tap_bench.works(None)["1 row"].keys() == TAPS.keys()  # type: ignore[arg-type]


def test_taps_are_told_in_read_outs() -> None:
    added = tap_bench.tables([{"1 row": TAPS}]).split("\n\n")[1].splitlines()[2]
    assert added.split("|")[2].strip() == "2.00"
    assert {cell.strip() for cell in added.split("|")[3:-1]} == {"2.50 (2.50–2.50)"}


def test_gaps_are_those_of_a_span_of_time() -> None:
    client = Client("", 0, times=[1.0, 2.0, 4.0, 7.0, 11.0])
    assert client.gaps((4.5, 5.0)) == [3.0]
    assert client.gaps((3.0, 7.5)) == pytest.approx([2.0, 3.0, 4.0])
    assert client.gaps((12.0, 13.0)) == []
