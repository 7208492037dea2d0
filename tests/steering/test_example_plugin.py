"""The package of docs/guide/write-a-method.md: it installs, is discovered, passes its kit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import steering

ROOT = Path(steering.__file__).parent.parent
EXAMPLE = ROOT / "docs" / "guide" / "examples" / "coxswain-dera"
TUTORIAL = ROOT / "docs" / "guide" / "write-a-method.md"


def python(*arguments: str, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example is installed into."""
    pytest.importorskip("pip", reason="the environment was made without pip")
    folder = tmp_path_factory.mktemp("site")
    # Building writes into the source folder, hence a copy.
    source = shutil.copytree(EXAMPLE, folder / "source")
    target = folder / "target"
    pip = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q")
    python(*pip, "--disable-pip-version-check", "--target", str(target), str(source), path=target)
    return target


def test_the_example_is_discovered_once_it_is_allowed(site: Path) -> None:
    code = """if True:
        from steering.plugins import discover
        plugin = discover(allow=["coxswain-dera"]).plugins["dera"]
        print(plugin.method.name, plugin.package, plugin.version, *discover().ignored)
    """
    assert python("-c", code, path=site).split() == [
        "dera",
        "coxswain-dera",
        "0.1.0",
        "coxswain-dera",
    ]


def test_the_example_passes_its_kit(site: Path) -> None:
    kit = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"))
    assert "8 passed" in python(*kit, path=site)


def test_the_tutorial_shows_the_example_as_it_is() -> None:
    shipped = (EXAMPLE / "coxswain_dera.py").read_text()
    shipped += (EXAMPLE / "pyproject.toml").read_text()
    shipped += (EXAMPLE / "tests" / "test_dera.py").read_text()

    def lines(text: str) -> set[str]:
        return {line.strip() for line in text.splitlines()}

    blocks = re.findall(r"```(?:python|toml)\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks[:3]:
        assert lines(block) <= lines(shipped)


def test_the_tutorial_names_every_member_of_the_contract() -> None:
    from steering.method import Method
    from steering.plan import RuleKind

    text = TUTORIAL.read_text()
    members = [name for name in Method.__annotations__ if not name.startswith("_")]
    for name in [*members, *Method.__abstractmethods__]:
        assert f"| `{name}` |" in text
    for kind in RuleKind:
        if kind is not RuleKind.SUM:
            assert f"RuleKind.{kind.name}" in text
