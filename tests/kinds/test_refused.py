"""Kinds that are not served are refused before the engine hears of them, in a sentence that names
them and says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import AdapterError
from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from tests.adapters.kinds import REFUSED, Case, make
from tests.kinds.table import Row


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_the_sentence(
    case: Case, bases: Callable[[str], Path], tmp_path: Path, row: Callable[[Case], Row]
) -> None:
    base = bases(case.base)
    folder = make(case, tmp_path, base, seed=3)
    with pytest.raises(AdapterError, match=case.says) as raised:
        inspect(folder, base_shapes(base), max_rank=64)
    assert "unexpected" not in str(raised.value)
    assert len(raised.value.message) < 400
    row(case).refused(case, raised.value.message)
