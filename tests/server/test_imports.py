"""What may be imported where: the light side stays light, and nothing reaches the worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIGHT = (
    "main", "launch", "loading", "access", "console", "context", "errors", "validation",
    "settings.config", "settings.file", "settings.flags", "settings.operating",
    "settings.reference",
    "checks.capacity", "checks.checkpoints", "checks.diagnosis", "checks.doctor",
    "checks.templates",
    "commands.adapters", "commands.methods", "commands.profiles", "commands.status",
    "commands.train",
    "operation.auth", "operation.limits", "operation.gate", "operation.metrics",
    "operation.access_log", "operation.rate_limits", "operation.state",
    "requests.own_prompts", "requests.profiles", "requests.sandbox", "requests.report",
    "requests.resolve",
    "routes.openapi",
)  # fmt: skip


def loaded_after(code: str) -> set[str]:
    """Top-level packages and our own modules that a fresh process has after running `code`."""
    show = "import sys; print(chr(10).join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return set(done.stdout.split())


@pytest.mark.parametrize("name", LIGHT)
def test_the_light_side_loads_neither_torch_nor_vllm(name: str) -> None:
    assert not {"torch", "vllm", "transformers"} & loaded_after(f"import server.{name}")


def test_the_command_line_starts_without_anything_heavy() -> None:
    assert not {"pydantic", "fastapi", "uvicorn", "torch"} & loaded_after("import server.main")


def test_no_module_of_ours_imports_the_worker() -> None:
    for file in (ROOT / "server").rglob("*.py"):
        assert "steering.worker" not in file.read_text(encoding="utf-8"), file
