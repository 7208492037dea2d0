"""The README's promises, and the documentation's examples: they run, its methods are all."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from steering.plugins import BUILT_INS, discover

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
"""Where the README's examples look for the server."""


@dataclass(frozen=True)
class Example:
    """A fenced block behind a comment `<!-- example: NAME -->`."""

    name: str
    language: str
    code: str
    output: str
    """What the page says that it prints, in a block of text behind it; empty if it says nothing."""

    @property
    def body(self) -> dict[str, object]:
        """The JSON that a curl example sends."""
        words = shlex.split(self.code)
        found: dict[str, object] = json.loads(words[words.index("-d") + 1])
        return found


def examples(text: str) -> list[Example]:
    """Those of a page."""
    block = r"^<!-- example: (\w+) -->\n```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)\n```$)?"
    return [Example(*found) for found in re.findall(block, text, flags=re.DOTALL | re.MULTILINE)]


GUIDE = ROOT / "docs" / "guide"
PAGES = [
    ROOT / "docs" / "start" / "quick-start.md",
    GUIDE / "adapters.md",
    *sorted((GUIDE / "methods").glob("*.md")),
]
EXAMPLES = examples(README)
ALL = EXAMPLES + [e for page in PAGES for e in examples(page.read_text(encoding="utf-8"))]
CURL = [e for e in ALL if e.language == "bash" and "curl" in e.code]
SHELL = [e for e in ALL if e.language == "bash" and "curl" not in e.code]
PYTHON = [e for e in ALL if e.language == "python"]
METHODS = sorted(BUILT_INS)


def test_every_runnable_block_is_an_example() -> None:
    for text in (README, *(page.read_text(encoding="utf-8") for page in PAGES)):
        blocks = re.findall(r"^```(?:bash|python)$", text, flags=re.MULTILINE)
        assert len(blocks) == len(examples(text))
    names = [example.name for example in ALL]
    assert len(set(names)) == len(names)


def test_the_readme_is_short_and_shows_an_answer_before_and_after() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    before, after = (e for e in EXAMPLES if e.name in ("before", "after"))
    assert before.output and after.output and before.output != after.output


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_valid_example_for_curl_and_for_the_client(method: str) -> None:
    example = next(e for e in CURL if e.name == method)
    assert discover()[method].config.model_validate(example.body["steering"]).method == method
    assert any(f'"method": "{method}"' in e.code for e in PYTHON)


@pytest.mark.engine
@pytest.mark.timeout(600)  # the first test waits for the server to start
@pytest.mark.parametrize("example", CURL, ids=lambda e: e.name)
def test_the_curl_examples_are_answered(example: Example, zoo: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    found = run(["bash", "-euo", "pipefail", "-c", example.code.replace(ADDRESS, zoo)])
    answer = json.loads(found)
    assert "error" not in answer
    (choice,) = answer["choices"]
    text = choice.get("text") or choice["message"]["content"]
    assert text
    if example.output:
        assert text.strip() == example.output
    steering = example.body.get("steering", {})
    assert isinstance(steering, dict)
    assert ("steering" in answer) == bool(steering.get("report"))


@pytest.mark.engine
@pytest.mark.timeout(600)  # the first test waits for the server to start
@pytest.mark.parametrize("example", PYTHON, ids=lambda e: e.name)
def test_the_python_examples_run(example: Example, zoo: str) -> None:
    assert run([sys.executable, "-c", example.code.replace(ADDRESS, zoo)]).strip()


@pytest.mark.engine
@pytest.mark.timeout(600)  # the first test waits for the server to start
@pytest.mark.parametrize("example", SHELL, ids=lambda e: e.name)
def test_the_commands_run(example: Example, zoo: str) -> None:
    bin_folder = str(Path(sys.executable).parent)
    code = example.code.replace(".venv/bin", bin_folder)
    assert run(["bash", "-euo", "pipefail", "-c", code], COXSWAIN_URL=zoo).strip()


def run(command: list[str], **environ: str) -> str:
    """The command's output; a failure shows what it said."""
    # A proxy that the environment names must not stand between the example and this machine.
    done = subprocess.run(
        command,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environ},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
