"""What `make test` takes of what `make test-nightly` does in full."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

NIGHTLY = "COXSWAIN_NIGHTLY_TESTS"
"""Set by `pytest --nightly`, also for tests that run in processes of their own."""


def nightly() -> bool:
    """Whether this run takes what is marked `nightly`."""
    return NIGHTLY in os.environ


def mostly_nightly(values: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """The values for `parametrize`, all but a few of them marked `nightly`."""
    return [pytest.param(v, marks=[] if v in few else pytest.mark.nightly) for v in values]


def examples(count: int) -> int:
    """How many examples a property is tried with: `count` at night, a fifth of them by day."""
    return count if nightly() else count // 5
