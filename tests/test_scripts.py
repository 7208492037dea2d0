"""The scripts in examples/: each runs and prints what it promises; the zoo's server answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "plain": r".+",
    "steered": r"base: +(?P<base>.+)\nsteered: (?P<steered>.+)\nprofile: (?P<profile>.+)",
    "adapter": r"without: (?P<without>.+)\nwith: +(?P<answer>\S+)",
    "streaming": r"(?P<text>.+)\n\nreport: \{.*'mean_kl'.*",
    "vllm_client": (
        r"models: \[.*'base'.*\]\nsampled: .+\n"
        r"structured:  frog\nadapter: +\S+.*"
    ),
    "own_method": (
        r"plan: .+\nlargest difference to the formula: \S+e-1[45] nats\nrefused: .+share.+"
    ),
}
"""Script → what it prints, as a whole."""


def run(name: str, url: str) -> str:
    """What a script prints."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COXSWAIN_", "OPENAI_"))}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        env={**kept, "COXSWAIN_URL": url, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def found(name: str, url: str) -> re.Match[str]:
    """The parts of what it prints."""
    printed = run(name, url)
    match = re.fullmatch(SCRIPTS[name], printed, re.DOTALL)
    assert match is not None, printed
    return match


def test_every_script_is_tried_and_told_of() -> None:
    there = {file.stem for file in EXAMPLES.glob("*.py")}
    assert there == set(SCRIPTS) and len(there) == 6
    told = (EXAMPLES / "README.md").read_text("utf-8")
    assert all(f"[`{name}.py`]({name}.py)" in told for name in there)


def test_a_method_of_ones_own() -> None:
    found("own_method", "http://127.0.0.1:1")


@pytest.mark.engine
@pytest.mark.parametrize("name", ["plain", "streaming", "vllm_client"])
def test_a_script_runs(name: str, zoo: str) -> None:
    found(name, zoo)


@pytest.mark.engine
def test_steering_changes_the_answer_and_the_profile_is_the_same(zoo: str) -> None:
    answers = found("steered", zoo)
    assert answers["steered"] == answers["profile"] != answers["base"]


@pytest.mark.engine
def test_an_adapter_answers_and_is_gone_afterwards(zoo: str) -> None:
    def names() -> set[str]:
        models = httpx.get(f"{zoo}/v1/models", timeout=60).json()["data"]
        return {model["id"] for model in models}

    before = names()
    answers = found("adapter", zoo)
    assert answers["answer"] != answers["without"]
    assert names() == before
