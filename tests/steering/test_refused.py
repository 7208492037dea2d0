"""No steered engine starts under arguments with which it would answer wrongly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from steering.engine_args import steered_engine_args
from steering.errors import DoesNotFit
from steering.refused import REFUSED, refusals
from tests.models import make_model

BAD: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "data_parallel_external_lb": True,
    "data_parallel_multi_port_external_lb": True,
    "data_parallel_hybrid_lb": True,
    "data_parallel_rank": 0,
    "decode_context_parallel_size": 2,
    "prefill_context_parallel_size": 2,
    "enable_dbo": True,
    "enable_prompt_embeds": True,
    "structured_outputs_config": {"backend": "auto"},
    "load_format": "pt",
    "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"},
    "kv_transfer_config": {"kv_connector": "X"},
    "enable_sleep_mode": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain model."""
    return str(make_model(tmp_path_factory.mktemp("refused") / "llama", "llama"))


def test_each_refusal_is_tried() -> None:
    assert BAD.keys() == {name for name, _, _ in REFUSED}


@pytest.mark.parametrize("name", BAD)
def test_an_argument_is_refused_by_name(name: str, model: str) -> None:
    with pytest.raises(DoesNotFit, match=rf"engine\.{name}: refused \(got "):
        steered_engine_args(model, {}, **{name: BAD[name]})


@pytest.mark.parametrize("mode", ["FULL", "piecewise", SimpleNamespace(name="FULL_DECODE_ONLY")])
def test_captured_graphs_are_refused_however_they_are_written(mode: Any, model: str) -> None:
    for config in ({"cudagraph_mode": mode}, SimpleNamespace(cudagraph_mode=mode)):
        assert [name for name, _ in refusals({"compilation_config": config})] == [
            "compilation_config"
        ]


def test_graphs_are_off_beside_other_settings(model: str) -> None:
    found = steered_engine_args(model, {}, compilation_config={"mode": 3})
    assert found["compilation_config"] == {"mode": 3, "cudagraph_mode": "NONE"}
    assert steered_engine_args(model, {})["compilation_config"] == {"cudagraph_mode": "NONE"}


def test_a_value_of_another_type_is_told() -> None:
    ((name, sentence),) = refusals({"pipeline_parallel_size": "two"})
    assert name == "pipeline_parallel_size" and sentence == "not a usable value (got 'two')"
