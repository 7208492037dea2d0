"""No steered engine starts under arguments with which it would answer wrongly."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from steering.engine_args import steered_engine_args
from steering.errors import DoesNotFit
from steering.refused import REFUSED, refusals, refused_config, refused_environment
from steering.worker.runners import v1, v2
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
    "kv_offloading_size": 4.0,
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


def bound(graphs: str = "NONE", transfer: Any = None, sleeps: bool = False) -> Any:
    """What is looked at of a `VllmConfig`."""
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=graphs)),
        kv_transfer_config=transfer,
        model_config=SimpleNamespace(enable_sleep_mode=sleeps),
    )


def v1_runner(config: Any) -> Any:
    """An engine's runner as far as it is checked."""
    runner = object.__new__(GPUModelRunner)
    runner.vllm_config, runner.scheduler_config = config, SimpleNamespace(async_scheduling=False)
    return runner


def v2_runner(config: Any) -> Any:
    """The same of Model Runner V2."""
    state = object.__new__(v2.SteeredModelState)
    return SimpleNamespace(model_state=state, vllm_config=config, speculative_config=None)


@pytest.mark.parametrize("view", [(v1._check, v1_runner), (v2._check, v2_runner)])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"graphs": "FULL"}, "compilation_config.cudagraph_mode: refused (got FULL): "),
        ({"sleeps": True}, "enable_sleep_mode: refused (got True): heads are not restored"),
        (
            {"transfer": SimpleNamespace(kv_connector="LMCacheMPConnector")},
            "kv_transfer_config.kv_connector: refused (got LMCacheMPConnector): a connector would",
        ),
    ],
)
def test_what_an_engine_came_to_is_refused_when_the_streams_are_bound(
    changes: dict[str, Any], words: str, view: Any
) -> None:
    """However it came: vLLM's platforms and other settings change what was asked for."""
    check, runner = view
    check(runner(bound()))
    with pytest.raises(ValueError, match=re.escape(words)):
        check(runner(bound(**changes)))


def test_offloading_of_keys_and_values_is_a_connector(model: str) -> None:
    """VLLM makes it one, so that it is seen at binding where no front end has looked."""
    config = AsyncEngineArgs(model=model, kv_offloading_size=0.5).create_engine_config()
    (sentence,) = refused_config(config)
    assert sentence.startswith("kv_transfer_config.kv_connector: refused (got ")
    assert refused_config(AsyncEngineArgs(model=model).create_engine_config()) == []


def test_a_runner_without_a_view_is_refused() -> None:
    with pytest.raises(ValueError, match="this engine has SimpleNamespace of types"):
        v1._check(SimpleNamespace())
    with pytest.raises(ValueError, match="this engine has SimpleNamespace of types"):
        v2._check(SimpleNamespace(model_state=SimpleNamespace()))


def test_names_of_layers_within_compiled_code_are_refused(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_LAYERNAME", "1")
    assert refused_environment() == []
    monkeypatch.setenv("VLLM_USE_LAYERNAME", "0")
    with pytest.raises(DoesNotFit, match=r"VLLM_USE_LAYERNAME: refused \(got '0'\)"):
        steered_engine_args(model, {})
    with pytest.raises(ValueError, match="VLLM_USE_LAYERNAME"):
        v1._check(v1_runner(bound()))
