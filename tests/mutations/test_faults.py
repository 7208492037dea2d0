"""The list of faults fits the code: `python -m tests.mutations` tries them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.mutations.faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]


def test_every_fault_can_be_put_in() -> None:
    for fault in FAULTS:
        count = (ROOT / fault.file).read_text("utf-8").count(fault.old)
        assert count == 1, (fault.file, fault.old, count)
        assert fault.old != fault.new and fault.why


def test_the_tests_of_every_fault_are_there() -> None:
    for fault in FAULTS:
        assert fault.tests, fault.why
        for test in fault.tests.split():
            assert (ROOT / test.partition("::")[0]).exists(), test


def test_all_packages_have_faults() -> None:
    counts = Counter(fault.file.partition("/")[0] for fault in FAULTS)
    assert counts.keys() == {"adapters", "server", "steering"}
    assert counts.total() >= 40 and min(counts.values()) >= 10
