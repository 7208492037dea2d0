"""Every configuration that the pages and `deploy/` show starts a server, on CPUs and on GPUs: tiny
models in place of those it names, all checks, and vLLM's own configuration of the engine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings.yaml_text import read_yaml
from tests.adapters.make import make_lora
from tests.deploy.as_cuda import PLATFORMS
from tests.docs.test_examples import CONFIGURATIONS
from tests.engine.heads import classifier, valued
from tests.models import make_model

ROOT = Path(__file__).parents[2]
VALUES = sorted((ROOT / "deploy" / "helm" / "coxswain" / "ci").glob("*-values.yaml"))
DEPLOY_PAGE = (ROOT / "docs" / "deploy" / "deploy.md").read_text("utf-8")
KUBERNETES_PAGE = (ROOT / "docs" / "deploy" / "kubernetes.md").read_text("utf-8")

Document = dict[str, Any]


def _document(file: Path) -> Document:
    found: Any = read_yaml(file.read_text("utf-8"))
    return dict(found)


def shown() -> Iterator[tuple[str, Document]]:
    """(where, configuration), models and paths as they stand there."""
    yield from CONFIGURATIONS
    for file in (ROOT / "zoo" / "server.yaml", ROOT / "deploy" / "server.yaml"):
        yield str(file.relative_to(ROOT)), _document(file)
    for file in VALUES:
        yield f"helm/{file.name}", helm_config(yaml.safe_load(file.read_text("utf-8")))
    (block,) = re.findall(r"^```yaml\n(config:.*?)^```$", KUBERNETES_PAGE, re.DOTALL | re.M)
    yield "kubernetes.md", helm_config(yaml.safe_load(block))
    # What the page tells of several GPUs, on top of the largest example.
    example = dict(CONFIGURATIONS)["quick-start.md"]
    for name, value in re.findall(r"`engine\.(\w+): (\d+)` (?:splits|runs)", DEPLOY_PAGE):
        engine = {**example["engine"], name: int(value)}
        yield f"deploy.md, {name}", {**example, "engine": engine}


def helm_config(values: Document) -> Document:
    """The server's file, as the chart makes it (test_chart.py)."""
    found: Document = json.loads(json.dumps(values["config"]))
    found.pop("auth", None)
    if "adapters" in found:
        found["registry"] = {"url": values["registry"]["url"]}
        found["adapters"]["store"] = "/var/lib/coxswain/adapters"
    return found


SHOWN = dict(shown())


def test_the_configurations_are_found() -> None:
    assert {"real-models.md", "quick-start.md", "configuration.md", "README.md"} <= SHOWN.keys()
    assert {f"helm/{file.name}" for file in VALUES} | {"deploy/server.yaml"} <= SHOWN.keys()
    assert {"deploy.md, tensor_parallel_size", "deploy.md, data_parallel_size"} <= SHOWN.keys()


def long(folder: Path) -> str:
    """Lets a model have any context that a configuration names."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    return str(folder)


@pytest.fixture(scope="module")
def stand_in(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Document], tuple[str, Document]]:
    """Puts tiny models in the place of those that a configuration names: (its folder, it)."""
    root = tmp_path_factory.mktemp("shown")
    base = long(make_model(root / "base", "llama"))
    heads = {
        None: long(make_model(root / "chat", "llama", seed=1)),
        "classifier": str(
            classifier(root / "critic", "llama", 2, tokens=True, labels=1).source.model
        ),
        "value": str(valued(root / "value", "llama", 3).source.model),
    }
    for kind in ("classifier", "value"):
        long(Path(heads[kind]))
    make_lora(root / "adapters" / "sql", Path(base), seed=4)
    (root / "chat_template.jinja").write_text("{{ messages }}")

    def replaced(document: Document) -> tuple[str, Document]:
        text = json.dumps(document)
        if "models/base-large" in text:  # the zoo's own models are here
            zoo = json.loads(text.replace("/zoo/", ""))
            return str(ROOT / "zoo"), zoo
        found = json.loads(text)
        found["model"] = base
        for stream in found.get("streams", {}).values():
            if "model" in stream:
                stream["model"] = heads[stream.get("head")]
                stream.pop("path", None)  # its head is in the model
        return str(root), found

    return replaced


@pytest.fixture(scope="module")
def problems(
    stand_in: Callable[[Document], tuple[str, Document]],
) -> dict[str, dict[str, list[str]]]:
    """Platform → where → why the server would not start."""
    asked = [(name, *stand_in(document)) for name, document in SHOWN.items()]
    command = [sys.executable, "-W", "ignore", "-m", "tests.deploy.as_cuda"]
    # The engine tests set vLLM's environment for their own process.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        command,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=alone,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("where", SHOWN)
def test_a_shown_configuration_starts(
    where: str, platform: str, problems: dict[str, dict[str, list[str]]]
) -> None:
    assert problems[platform][where] == []
