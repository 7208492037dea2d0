"""What the pages show is accepted: requests by the zoo's limits, configurations by the parser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.checks.doctor import snapshot
from server.requests.protocol import SteeredChatRequest, SteeredCompletionRequest
from server.settings import file
from server.settings.config import Config
from steering.method import Snapshot
from steering.plan import SteeringPlan
from steering.plugins import discover
from steering.resolve import resolve
from steering.spec import read_steering
from tests.test_readme import CURL, PAGES, ROOT, Example, examples

METHODS = discover()
TRACE = ROOT / "docs" / "internals" / "architecture.md"


@pytest.fixture(scope="module")
def zoo() -> Config:
    """The zoo's settings."""
    return file.load(ROOT / "zoo" / "server.yaml", {})


def plan_of(body: dict[str, Any], config: Config) -> SteeringPlan | None:
    """What the zoo's server would make of a request."""
    streams: Snapshot = snapshot(config)
    found = read_steering(
        body.get("steering"),
        profiles=config.profiles,
        limits=config.steering.limits,
        model_profile=body["model"] if body["model"] in config.profiles else None,
    )
    if found is None:
        return None
    return resolve(found.spec, methods=METHODS, snapshot=streams, limits=found.limits).plan


@pytest.mark.parametrize("example", CURL, ids=lambda e: e.name)
def test_requests_are_valid(example: Example, zoo: Config) -> None:
    body: dict[str, Any] = dict(example.body)
    chat = "chat/completions" in example.code
    model = SteeredChatRequest if chat else SteeredCompletionRequest
    parsed = model.model_validate(body)
    assert not parsed.model_extra
    assert plan_of(body, zoo) is not None or "steering" not in body
    known = {adapter.name for adapter in zoo.adapters.preload} if zoo.adapters else set()
    assert {adapter["name"] for adapter in body.get("adapters", [])} <= known
    assert body["model"] in {"base", *zoo.profiles, *known}


METHOD_PAGES = [p for p in PAGES if p.parent.name == "methods" and p.name != "README.md"]


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda p: p.name)
def test_a_method_page_shows_its_method(page: Path) -> None:
    title = page.read_text("utf-8").split("\n")[0]
    (shown,) = examples(page.read_text("utf-8"))
    steering: Any = shown.body["steering"]
    assert f"`{steering['method']}`" in title


def test_the_traced_plan_is_what_the_request_becomes(zoo: Config) -> None:
    text = TRACE.read_text("utf-8")
    (request,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (shown,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    plan = eval(shown, {"SteeringPlan": SteeringPlan})
    assert plan_of(yaml.safe_load(request), zoo) == plan


def configurations() -> list[tuple[str, dict[str, Any]]]:
    """YAML blocks of the pages that are whole configurations."""
    pages = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    blocks = [
        (page.name, yaml.safe_load(block))
        for page in pages
        for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.M)
    ]
    return [(name, block) for name, block in blocks if isinstance(block, dict) and "model" in block]


CONFIGURATIONS = configurations()


def test_the_pages_have_configurations() -> None:
    assert {"README.md", "quick-start.md", "real-models.md"} <= {name for name, _ in CONFIGURATIONS}


@pytest.mark.parametrize(("page", "document"), CONFIGURATIONS, ids=[n for n, _ in CONFIGURATIONS])
def test_configurations_are_valid(page: str, document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    config = file.parse(document, tmp_path, {})
    streams = snapshot(config)
    for profile in config.profiles.values():
        resolve(profile.spec, methods=METHODS, snapshot=streams, limits=config.steering.limits)
