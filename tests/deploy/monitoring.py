"""What the dashboard and the alert rules ask of Prometheus, parsed by Prometheus's grammar."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "coxswain.json"
SCRAPING = DEPLOY / "prometheus" / "prometheus.yml"
ALERTING = DEPLOY / "prometheus" / "alertmanager.yml"

PROMETHEUS_OWN = frozenset({"up"})
"""Series that Prometheus makes itself."""

GPU_SERIES = frozenset(
    {
        "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_GPU_TEMP",
        "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_XID_ERRORS",
        "DCGM_FI_PROF_DRAM_ACTIVE", "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
    }
)  # fmt: skip
"""Series of NVIDIA's DCGM exporter, of those that it shows unless told otherwise
(https://github.com/NVIDIA/dcgm-exporter, etc/default-counters.csv)."""

PROMETHEUS_LABELS = frozenset({"instance", "job"})
"""Labels that it adds."""


@dataclass(frozen=True)
class Selector:
    """One series that a query reads.

    Args:
        where: the alert or the panel.
        name: of the series.
        labels: that it selects by.
    """

    where: str
    name: str
    labels: frozenset[str]


def tool(name: str) -> str:
    """The path of `prometheus`, `promtool` or `amtool`; skips where it is not installed."""
    found = shutil.which(name)
    if found is None:
        package = "prometheus-alertmanager" if name == "amtool" else "prometheus"
        pytest.skip(f"{name} is not installed: apt-get install {package}")
    return found


def rules() -> list[dict[str, Any]]:
    """The alert rules."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    """Its panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")
    for variable in dashboard()["templating"]["list"]:
        if match := re.fullmatch(r"label_values\((.+), (\w+)\)", variable.get("definition", "")):
            yield f"${variable['name']}", f"sum by ({match[2]}) ({match[1]})"


def selectors() -> Iterator[Selector]:
    """All series of the server that are read."""
    for where, query in queries():
        for found in _walk(where, promql.parse(query), frozenset()):
            if found.name not in GPU_SERIES:
                yield found


def about_gpus(query: str) -> bool:
    """Whether a query reads the GPUs' own exporter."""
    return "DCGM_" in query


def _walk(where: str, node: Any, grouped: frozenset[str]) -> Iterator[Selector]:
    if isinstance(node, promql.VectorSelector):
        asked = frozenset(matcher.name for matcher in node.matchers.matchers)
        assert node.name is not None, f"{where}: a selector without a name"
        yield Selector(where, node.name, asked | grouped)
        return
    if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
        grouped = grouped | frozenset(node.modifier.labels)
    inner = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for one in [*inner, *getattr(node, "args", ())]:
        if one is not None:
            yield from _walk(where, one, grouped)
