"""Bodies: what a null means, and which unknown fields are errors."""

from __future__ import annotations

from typing import Any

import pytest

from server.requests.protocol import SteeredChatRequest, SteeredResponsesRequest, refuse_unknown
from steering.errors import BadValue


@pytest.mark.parametrize("field", ["background", "store", "truncation", "tools"])
def test_a_null_in_a_body_of_the_responses_api_is_absent(field: str) -> None:
    """VLLM's answer repeats these, and must not find null in them."""
    body: dict[str, Any] = {"model": "m", "input": "a", field: None}
    request = SteeredResponsesRequest.model_validate(body)
    assert getattr(request, field) == type(request).model_fields[field].get_default(
        call_default_factory=True
    )
    assert getattr(request, field) is not None


@pytest.mark.parametrize("field", ["guided_json", "guided_regex", "guided_choice"])
def test_constraints_of_older_versions_are_never_ignored(field: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    request = SteeredChatRequest.model_validate({"messages": messages, field: "x"})
    with pytest.raises(BadValue, match=f"{field}: .*did you mean structured_outputs"):
        refuse_unknown(request, every=False)
