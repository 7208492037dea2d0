"""Reports whose choices ran in several engines, and on several ranks."""

from __future__ import annotations

from server.engine_vllm import one_report


def test_choices_of_several_engines_are_one_report() -> None:
    """Replies of one round are spread over data-parallel engines."""
    a, b, other = {"tokens": 1}, {"tokens": 2}, {"tokens": 3}
    assert one_report([[{"0": a}, {"0": other}], [{"1": b}, {}]]) == {"0": a, "1": b}
    assert one_report([[{}, {"0": a}]]) == {"0": a}
    assert one_report([[{}], [{}]]) == {}
