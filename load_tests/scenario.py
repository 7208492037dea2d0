"""Scenarios of `load_tests.load`, read from YAML files: who asks what, of which server.

`scenarios/traffic.yaml` has the arrivals, the same for every scenario so that figures compare; each
other file is one scenario: its server, the requests' bodies, objectives, and limits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCENARIOS = Path(__file__).with_name("scenarios")
TRAFFIC = "traffic.yaml"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Target = Literal["plain", "coxswain", "transformers", "client_mix"]
Figure = Literal["output_throughput", "request_goodput", "good_share", "p99_ttft_ms", "p99_itl_ms"]


class ScenarioError(ValueError):
    """A scenario file is wrong; names the file, the field and what is allowed."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Level(_Part):
    """One load: requests that arrive as a Poisson process.

    Args:
        rate: requests per second.
        requests: how many in all.
    """

    rate: Positive
    requests: Count


class Traffic(_Part):
    """What arrives, for all scenarios.

    Args:
        prompt_tokens, output_tokens: means; lengths are uniform.
        spread: from (1 − spread) to (1 + spread) times the mean.
        max_concurrency: more requests than that wait in the client.
        levels: by name.
        quick: the levels of the quick form.
    """

    prompt_tokens: Count
    output_tokens: Count
    spread: Annotated[float, Field(ge=0, lt=1)]
    max_concurrency: Annotated[int, Field(ge=1, le=64)]
    levels: Annotated[dict[str, Level], Field(min_length=1)]
    quick: Annotated[dict[str, Level], Field(min_length=1)]


class Objective(_Part):
    """When a request was served well; at least one is given.

    Args:
        ttft_ms: its first token came within that.
        tpot_ms: the mean time between its later tokens.
    """

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None

    @model_validator(mode="after")
    def _some(self) -> Objective:
        if self.ttft_ms is None and self.tpot_ms is None:
            raise ValueError("give ttft_ms, tpot_ms or both")
        return self


class Limit(_Part):
    """What a figure must reach.

    Args:
        figure: of the results; `good_share` is the share of requests that met the objective.
        level: at which load.
        over: the scenario whose figure it is divided by, in the same round; absent: none.
        at_least, at_most: exactly one.
    """

    figure: Figure
    level: str
    over: str | None = None
    at_least: Positive | None = None
    at_most: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> Limit:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least, at_most")
        return self


class Tenants(_Part):
    """A mixed population: each request belongs to one kind, drawn by a Zipf distribution.

    Args:
        exponent: s; the kind of rank r has a probability proportional to r^−s.
        kinds: request bodies' fields, most frequent first; an empty one asks the base.
    """

    exponent: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
    kinds: Annotated[list[dict[str, Any]], Field(min_length=1)]


class Scenario(_Part):
    """One line of the report.

    Args:
        name: the file's.
        title: in the report.
        about: a sentence for the report.
        target: which server it asks.
        body: fields for every request.
        tenants: instead, fields drawn for each request.
        slo: the objective for goodput.
        limits: what must hold.
        requests: at most so many per level, for servers that would take hours.
    """

    name: str
    title: str
    about: str = ""
    target: Target
    body: dict[str, Any] = {}
    tenants: Tenants | None = None
    slo: Objective
    limits: list[Limit] = []
    requests: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Scenario:
        if self.tenants and self.body:
            raise ValueError("give body or tenants, not both")
        if self.target != "coxswain" and (self.body or self.tenants):
            raise ValueError(f"target {self.target} takes neither body nor tenants")
        return self


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ScenarioError(f"{file}: not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ScenarioError(f"{file}: must be a mapping, is {type(found).__name__}")
    return found


def _explain(file: Path, error: ValidationError) -> ScenarioError:
    lines = []
    for one in error.errors():
        where = ".".join(str(part) for part in one["loc"]) or "the whole"
        value = "" if one["type"] == "missing" else f" (is {one['input']!r})"
        lines.append(f"{file}: {where}: {one['msg']}{value}")
    return ScenarioError("\n".join(lines))


def load_traffic(folder: Path = SCENARIOS) -> Traffic:
    """The traffic of a folder of scenarios.

    Raises:
        ScenarioError: the file is wrong.
    """
    file = folder / TRAFFIC
    try:
        return Traffic.model_validate(_read(file))
    except ValidationError as error:
        raise _explain(file, error) from error


def load_scenarios(folder: Path = SCENARIOS) -> dict[str, Scenario]:
    """All scenarios of a folder, by name.

    Raises:
        ScenarioError: a file is wrong, or a limit names a level or scenario that is not there.
    """
    found: dict[str, Scenario] = {}
    for file in sorted(folder.glob("*.yaml")):
        if file.name == TRAFFIC:
            continue
        try:
            found[file.stem] = Scenario.model_validate({**_read(file), "name": file.stem})
        except ValidationError as error:
            raise _explain(file, error) from error
    levels = load_traffic(folder).levels
    for name, scenario in found.items():
        for i, limit in enumerate(scenario.limits):
            where = f"{folder / name}.yaml: limits.{i}"
            if limit.level not in levels:
                raise ScenarioError(f"{where}.level: {limit.level!r} is none of {list(levels)}")
            if limit.over is not None and limit.over not in found:
                raise ScenarioError(f"{where}.over: {limit.over!r} is none of {list(found)}")
    return found
