"""deploy/Dockerfile: linted, and what it copies and runs is there. No image is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_all_packages_are_copied() -> None:
    for package in ("adapters", "steering", "server", "zoo"):
        assert f"COPY {package} {package}\n" in TEXT


def test_both_images_run_as_nobody_in_particular_with_a_health_check() -> None:
    runtime = TEXT[TEXT.index("AS runtime") :]
    user = re.findall(r"^USER (.+)$", TEXT, re.MULTILINE)
    assert user == ["10001:10001"] and "USER" in runtime
    assert "HEALTHCHECK" in runtime and "/health" in runtime
    for target in ("cpu", "cuda"):
        assert f"FROM runtime AS {target}\n" in TEXT


def test_the_command_is_one_of_ours() -> None:
    words = re.search(r"^CMD \[(\"serve\".+)\]$", TEXT, re.MULTILINE)
    assert words is not None
    given, rest = parser().parse_known_args(re.findall(r'"([^"]+)"', words[1]))
    assert (given.command, given.host) == ("serve", "0.0.0.0")
    assert rest == ["/etc/coxswain/server.yaml"]


def test_every_version_is_pinned() -> None:
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-\S+$", TEXT, re.MULTILINE)
    installs = re.findall(r"pip install .+", TEXT)
    assert len(installs) == 3
    assert all("-c deploy/constraints-" in line for line in installs)
    for name in ("cpu", "cuda"):
        lines = (FILE.parent / f"constraints-{name}.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert len(pins) > 150 and all(re.fullmatch(r"\S+==\S+( ; .+)?", pin) for pin in pins)
    text = (FILE.parent / "constraints-cuda.txt").read_text()
    assert "\nvllm==0.32.0\n" in text and "\ntorch==2.13.0\n" in text
