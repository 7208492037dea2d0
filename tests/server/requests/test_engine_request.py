"""Prompts that a base cannot lag behind."""

from __future__ import annotations

import pytest

from server.requests.engine_request import refuse_lag
from steering.errors import BadValue


def test_only_a_hybrid_base_refuses_longer_own_prompts() -> None:
    refuse_lag(0, hybrid=True)
    refuse_lag(5, hybrid=False)
    with pytest.raises(BadValue, match=r"^steering\.prompts: .*5 tokens more than the base's"):
        refuse_lag(5, hybrid=True)
