"""Scenario files: the shipped ones are right, wrong ones are refused with file, field and value."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from load_tests.load_models import REAL, configuration
from load_tests.scenario import SCENARIOS, ScenarioError, load_scenarios, load_traffic


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SCENARIOS, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(file: Path, **fields: Any) -> None:
    found = yaml.safe_load(file.read_text()) | fields
    file.write_text(yaml.safe_dump({k: v for k, v in found.items() if v is not None}))


def test_the_shipped_scenarios_ask_every_server() -> None:
    found = load_scenarios()
    targets = {scenario.target for scenario in found.values()}
    assert targets == {"plain", "coxswain", "transformers", "client_mix"}
    assert found["steered"].body["steering"].get("report") is None
    assert found["reported"].body["steering"] == found["steered"].body["steering"] | {
        "report": True
    }
    assert {tuple(scenario.slo) for scenario in found.values()} == {tuple(found["plain"].slo)}


def test_the_tenants_ask_for_models_that_the_server_has() -> None:
    served = configuration(REAL, {})
    names = {"base", *REAL.adapter_names(), *served["profiles"]}  # type: ignore[misc]
    tenants = load_scenarios()["tenants"].tenants
    assert tenants is not None
    assert {kind.get("model", "base") for kind in tenants.kinds} <= names


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target": "nowhere"}, "steered.yaml: target: Input should be 'plain', 'coxswain'"),
        ({"target": None}, "steered.yaml: target: Field required"),
        ({"slo": {}}, "steered.yaml: slo: Value error, give ttft_ms, tpot_ms or both (is {})"),
        ({"slo": {"ttft_ms": -1}}, "slo.ttft_ms: Input should be greater than 0 (is -1)"),
        ({"slo": {"ttft_ms": float("inf")}}, "slo.ttft_ms: Input should be a finite number"),
        ({"rate": 3}, "steered.yaml: rate: Extra inputs are not permitted (is 3)"),
        ({"requests": 0}, "requests: Input should be greater than or equal to 1 (is 0)"),
        ({"target": "plain"}, "target plain takes neither body nor tenants"),
        ({"tenants": {"exponent": 1, "kinds": [{}]}}, "give body or tenants, not both"),
        ({"body": None, "tenants": {"exponent": 1, "kinds": []}}, "at least 1 item"),
        (
            {"limits": [{"figure": "good_share", "level": "light"}]},
            "limits.0: Value error, give exactly one of at_least, at_most",
        ),
        (
            {"limits": [{"figure": "speed", "level": "light", "at_least": 1}]},
            "limits.0.figure: Input should be 'output_throughput'",
        ),
        (
            {"limits": [{"figure": "good_share", "level": "full", "at_least": 1}]},
            "limits.0.level: 'full' is none of ['light', 'medium', 'heavy']",
        ),
        (
            {"limits": [{"figure": "good_share", "level": "light", "over": "x", "at_most": 1}]},
            "limits.0.over: 'x' is none of",
        ),
    ],
)
def test_a_wrong_scenario_is_refused(folder: Path, fields: dict[str, Any], says: str) -> None:
    change(folder / "steered.yaml", **fields)
    with pytest.raises(ScenarioError) as caught:
        load_scenarios(folder)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"spread": 1.0}, "traffic.yaml: spread: Input should be less than 1 (is 1.0)"),
        ({"max_concurrency": 65}, "max_concurrency: Input should be less than or equal to 64"),
        ({"levels": {}}, "levels: Dictionary should have at least 1 item"),
        ({"levels": {"a": {"rate": 0, "requests": 1}}}, "levels.a.rate: Input should be greater"),
    ],
)
def test_wrong_traffic_is_refused(folder: Path, fields: dict[str, Any], says: str) -> None:
    change(folder / "traffic.yaml", **fields)
    with pytest.raises(ScenarioError) as caught:
        load_traffic(folder)
    assert says in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [("a: [", "not YAML"), ("- a", "must be a mapping")])
def test_a_file_that_is_no_mapping_is_refused(folder: Path, text: str, says: str) -> None:
    (folder / "steered.yaml").write_text(text)
    with pytest.raises(ScenarioError, match=rf"steered\.yaml: {says}"):
        load_scenarios(folder)
