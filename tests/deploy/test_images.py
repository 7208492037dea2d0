"""deploy/Dockerfile: linted, and what it copies and runs is there. No image is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.main import parser

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "Dockerfile"
TEXT = FILE.read_text(encoding="utf-8")


def tool(name: str) -> str:
    """A program that the environment carries."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"needs {name}, of the extra `dev`")
    return found


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(FILE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    broken.write_text(TEXT.replace("${PYTHON}", "latest").replace("--no-install-recommends ", ""))
    done = subprocess.run(
        [tool("hadolint"), str(broken)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "DL3015" in done.stdout


def test_every_copied_path_is_there_and_let_through() -> None:
    let = (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.MULTILINE)
    sources = [word for line in copied for word in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        rules = [rule[1:] for rule in let if rule.startswith("!")]
        assert any(Path(source).match(rule) for rule in rules), source


STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", TEXT, re.M | re.S))


def test_the_packages_are_copied_after_the_dependencies_and_no_models_are() -> None:
    for stage in ("build-cpu", "cuda"):
        text = STAGES[stage]
        installed = text.index("-r requirements.txt")
        for package in ("adapters", "steering", "server"):
            assert text.index(f"COPY {package} {package}\n") > installed
        assert "requirements.py" in text[:installed]
    assert "zoo" not in TEXT and "zoo" not in (FILE.parent / "Dockerfile.dockerignore").read_text()


def test_both_images_run_as_nobody_in_particular_with_a_health_check() -> None:
    both = ("USER ", "WORKDIR /var", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", 'CMD ["serve')
    said = []
    for stage in ("cpu", "cuda"):
        text = STAGES[stage]
        assert "\nUSER 10001:10001\n" in text and "useradd --uid 10001" in text
        assert "HEALTHCHECK" in text and "/health" in text
        said.append([line for line in text.splitlines() if line.startswith(both)])
    assert said[0] == said[1] and len(said[0]) == len(both)


def test_the_command_is_one_of_ours() -> None:
    words = re.search(r"^CMD \[(\"serve\".+)\]$", TEXT, re.MULTILINE)
    assert words is not None
    given, rest = parser().parse_known_args(re.findall(r'"([^"]+)"', words[1]))
    assert (given.command, given.host) == ("serve", "0.0.0.0")
    assert rest == ["/etc/coxswain/server.yaml"]


def test_every_version_is_pinned() -> None:
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-\S+$", TEXT, re.MULTILINE)
    assert re.search(r"^ARG VLLM=v0\.3[23]\.\d+$", TEXT, re.MULTILINE)
    installs = re.findall(r"pip install .+", TEXT)
    assert len(installs) == 5
    assert all("-c constraints" in line or "--no-deps" in line for line in installs)
    for name in ("cpu", "cuda"):
        pins = _pins(name)
        assert pins and all(re.fullmatch(r"\S+==\S+( ; .+)?", pin) for pin in pins)


def test_no_dependency_goes_without_a_version() -> None:
    """Of the CPU build; of the CUDA build, vLLM's image has most."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for e in ("cpu", "dev", "load") for r in extras[e])]
    pinned = {canonicalize_name(pin.split("==")[0]) for pin in _pins("cpu")}
    # Its own project, and what the build of torch decides: the file's head.
    found = {canonicalize_name(Requirement(one).name) for one in wanted} - {"coxswain", "triton"}
    assert found <= pinned, found - pinned


def _pins(name: str) -> list[str]:
    lines = (FILE.parent / f"constraints-{name}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_the_images_install_what_the_project_asks_for() -> None:
    done = subprocess.run(
        [sys.executable, FILE.with_name("requirements.py"), "cpu"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    assert done.stdout.splitlines() == wanted


def test_what_an_image_has_stays_and_the_pins_hold_for_the_rest(tmp_path: Path) -> None:
    has, pins = tmp_path / "has", tmp_path / "pins"
    has.write_text("torch==2.13.0+cu130\nvllm @ file:///dist/vllm.whl\nRuamel_YAML==0.18.1\n")
    pins.write_text("# why\nruamel.yaml==0.19.1\nredis==8.1.0\nvllm==0.1\n")
    done = subprocess.run(
        [sys.executable, FILE.with_name("requirements.py"), "--constraints", has, pins],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["torch==2.13.0+cu130", "Ruamel_YAML==0.18.1", "redis==8.1.0"]
