"""Which modules touch vLLM's model runners: their views, and nothing else by accident."""

from __future__ import annotations

import ast
from pathlib import Path

import steering.worker

ALLOWED = {
    "runners/v1": "the view of Model Runner V1",
    "runners/v2": "the view of Model Runner V2",
    "runners/speculator_hook": "makes Model Runner V2 build our speculator",
    "runners/v2_speculator": "the speculator of Model Runner V2",
    "streams/kv_layers": "completes a cache group of unequal layers",
}


def test_only_the_views_import_the_runners() -> None:
    folder = Path(steering.worker.__file__).parent
    touching = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            if any(name.startswith("vllm.v1.worker") for name in names):
                touching.add(file.relative_to(folder).with_suffix("").as_posix())
    assert touching == {*ALLOWED}
