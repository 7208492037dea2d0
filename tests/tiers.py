"""What of a long list of parameters `make test` takes; the rest is nightly."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_nightly(values: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """The values for `parametrize`, all but a few of them marked `nightly`."""
    return [pytest.param(v, marks=[] if v in few else pytest.mark.nightly) for v in values]
