"""The alert rules and the dashboard are well formed; `tests/server/operation` asks a live server
for every series that they read.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from tests.deploy.monitoring import (
    ALERTING,
    ALERTS,
    SCRAPING,
    about_gpus,
    dashboard,
    panels,
    queries,
    rules,
    selectors,
    tool,
)

ROOT = Path(__file__).resolve().parents[2]
ALERTS_TESTED = Path(__file__).with_name("alerts.test.yml")
RUNBOOK = ROOT / "docs" / "deploy" / "operations.md"
SERIES = ROOT / "docs" / "reference" / "metrics.md"


@pytest.mark.parametrize(("where", "query"), list(queries()))
def test_every_query_is_promql(where: str, query: str) -> None:
    promql.parse(query)


def test_a_query_that_is_none_is_found() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        promql.parse("sum(rate(coxswain_requests_total[5m])")


def test_the_walk_sees_names_labels_and_groups() -> None:
    found = {(s.name, s.where) for s in selectors()}
    assert ("coxswain_requests_total", "CoxswainErrors") in found
    assert ("coxswain_adapter_slots", "CoxswainAdaptersThrash") in found
    one = next(s for s in selectors() if s.where == "Refusals per second, by reason")
    assert one.labels == {"reason", "instance"}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_every_rule_says_for_how_long_how_bad_and_what_to_do(rule: dict[str, object]) -> None:
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+m", str(rule["for"]))
    assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
    annotations = rule["annotations"]
    assert isinstance(annotations, dict)
    assert annotations.keys() == {"summary", "description"}
    assert f"`{rule['alert']}`" in RUNBOOK.read_text(), "the runbook says nothing of it"


def test_names_of_rules_are_their_own() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("files", [
    ("check", "rules", ALERTS), ("test", "rules", ALERTS_TESTED),
    # Without its look for the key's file, which only the container has.
    ("check", "config", "--syntax-only", SCRAPING),
], ids=lambda files: " ".join(files[:2]))  # fmt: skip
def test_prometheus_takes_the_files_and_the_alerts_fire_when_they_should(
    files: tuple[str | Path, ...],
) -> None:
    done = subprocess.run([tool("promtool"), *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_made_to_fire() -> None:
    text = ALERTS_TESTED.read_text()
    for rule in rules():
        assert f'alertname="{rule["alert"]}"' in text


def test_the_scrape_configuration_loads_the_rules() -> None:
    found = yaml.safe_load(SCRAPING.read_text())
    assert found["rule_files"] == [ALERTS.name]
    job, gpus = found["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and gpus["job_name"] == "gpu"
    assert f'job="{job["job_name"]}"' in next(r["expr"] for r in rules() if "up{" in r["expr"])


def test_panels_have_their_own_ids_and_places() -> None:
    found = dashboard()["panels"]
    ids = [panel["id"] for panel in found]
    assert len(ids) == len(set(ids))
    for one, other in combinations([panel["gridPos"] for panel in found], 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)


def test_panels_use_variables_that_there_are_and_a_datasource_that_can_be_chosen() -> None:
    there = {variable["name"] for variable in dashboard()["templating"]["list"]}
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= there, panel["title"]
            assert ("instance" in used) != about_gpus(target["expr"]), panel["title"]


def test_the_reference_lists_every_series_of_ours_that_is_read() -> None:
    text = SERIES.read_text("utf-8")
    for name in {s.name for s in selectors() if s.name.startswith("coxswain_")}:
        base = re.sub(r"_(bucket|count|sum)$", "", name)
        assert f"`{base}`" in text or f"`{base}{{" in text, name


def test_alertmanager_takes_its_example() -> None:
    done = subprocess.run(
        [tool("amtool"), "check-config", ALERTING], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("severity", "receiver"), [("page", "pages"), ("ticket", "tickets")])
def test_pages_and_tickets_go_their_own_ways(severity: str, receiver: str) -> None:
    command = [tool("amtool"), "config", "routes", "test", f"--config.file={ALERTING}"]
    done = subprocess.run(
        [*command, f"severity={severity}", "alertname=CoxswainDown"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, receiver), done.stderr


def test_grafanas_own_schema_knows_every_field_of_the_dashboard() -> None:
    """Read and written by Grafana's library of its dashboards' schema, nothing gets lost."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins.register_default_plugins()

    def lost(document: dict[str, Any]) -> set[str]:
        through = models.Dashboard.from_json(document)
        back = json.loads(encoder.JSONEncoder(sort_keys=True).encode(through))
        return set(_differences(document, back, ""))

    # What Grafana shows of a variable's query in its list; the library has no field for it.
    allowed = {f"/templating/list/{i}/definition" for i in range(1, 5)}
    assert lost(dashboard()) == allowed
    wrong = dashboard()
    wrong["panels"][1]["gridPosition"] = wrong["panels"][1].pop("gridPos")
    wrong["panels"][1]["targets"][0]["exprs"] = "x"
    assert lost(wrong) - allowed == {"/panels/1/gridPosition", "/panels/1/targets/0/exprs"}


def _differences(one: object, other: object, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key, value in one.items():
            if key in other:
                yield from _differences(value, other[key], f"{path}/{key}")
            else:
                yield f"{path}/{key}"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (value, there) in enumerate(zip(one, other, strict=True)):
            yield from _differences(value, there, f"{path}/{i}")
    elif one != other:
        yield path
