"""The claim `small` from the real model to its figures, with a few items."""

from __future__ import annotations

from pathlib import Path

import pytest

from smollm.convert import MODEL, convert_package
from smollm.evidence.claim import Claim
from smollm.evidence.small import MIXES, STRENGTHS, run
from smollm.evidence.work import Work

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(1200)]


def test_the_claim_is_measured(tmp_path: Path) -> None:
    convert_package(MODEL)
    found = run(Work(MODEL, tmp_path, quick=True))
    assert Claim.read(found.write(tmp_path)).ours == found.ours
    test, validation, cost = found.tables
    assert len(test.rows) == 6 and len(validation.rows) == 6 + len(STRENGTHS) + len(MIXES)
    read = [one for _, one, *_ in cost.rows if isinstance(one, float)]
    assert len(read) == 3 and 10 < read[1] < 20 < read[0] < read[2] < 2 * read[0]
