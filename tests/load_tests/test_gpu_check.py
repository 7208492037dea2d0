"""The GPU's check, as far as it needs no GPU: its command line, its sections, its time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from load_tests.gpu_check import __main__ as command
from load_tests.gpu_check import sections
from load_tests.gpu_check.engine import PAIRS, fitting, summary
from load_tests.gpu_check.sections import SECTIONS, Outcome, Section, apart
from load_tests.shapes import gib
from tests.interpreted import interpret

ROOT = Path(__file__).resolve().parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)

FOREIGN = ("vllm", "transformers", "peft", "pydantic", "msgspec", "tokenizers", "pytest", "scipy")
MISSING = f"""
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {FOREIGN!r}:
            raise ImportError(name + " is missing")
sys.meta_path.insert(0, Missing())
"""
"""Makes packages unknown to every process that finds this as `sitecustomize`."""


@pytest.mark.nightly
@needs_triton
def test_interpreted() -> None:
    interpret("tests/load_tests/interpreted")


@pytest.mark.slow
@needs_triton
def test_stage_one_needs_little(tmp_path: Path) -> None:
    """PyTorch, Triton, NumPy and the repository; each section has a process of its own."""
    (tmp_path / "sitecustomize.py").write_text(MISSING)
    found, out = os.environ | {"PYTHONPATH": str(tmp_path)}, tmp_path / "found.json"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=found, capture_output=True, text=True)

    assert "vllm is missing" in run("-c", "import vllm").stderr
    imported = run("-c", "from load_tests.gpu_check import kernels, recorded, speed, toy")
    assert imported.returncode == 0, imported.stderr
    checked = run("-m", "load_tests.gpu_check", "--only", "d", "--out", str(out))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    [section] = json.loads(out.read_text())["sections"]
    assert (section["letter"], section["status"]) == ("D", "PASS")


@pytest.mark.nightly
@pytest.mark.timeout(900)
@needs_triton
def test_the_engine_section_on_emulated_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    outcome = apart(next(s for s in SECTIONS if s.letter == "G"), 600)
    assert outcome.status == "PASS", outcome
    assert all(outcome.data["replays"].values()) and outcome.data["tokens"] > 40


# --- processes ----------------------------------------------------------------------------------

UNKNOWN = Section("X", "no section", ("kernels", "adapter_sum"), 1)


def test_a_process_that_dies_is_a_failure() -> None:
    outcome = apart(UNKNOWN, 20)
    assert outcome.status == "FAIL"
    assert outcome.figure == "the process ended with status 1: StopIteration"


def test_a_process_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "GRACE_S", 0.0)
    outcome = apart(SECTIONS[0], 0.01)
    assert (outcome.status, outcome.figure) == ("FAIL", "stopped after 0 s")


# --- the command line ---------------------------------------------------------------------------


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    assert command.main(["--only", "A"]) == 1
    assert capsys.readouterr().err == "The check needs triton: nothing was checked.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "A,Z"], "'Z' is none of A, B, C, D, E, F, G, H"),
        (["--seconds", "0"], "'0' is not a number of seconds above 0"),
        (["--seconds", "nan"], "'nan' is not a number of seconds above 0"),
    ],
)
def test_flags_are_checked(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def passed(section: Section) -> Outcome:
    return Outcome(section.letter, section.title, "PASS", "", 0.0, {})


def test_engines_are_skipped_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, float] = {}

    def run(section: Section, seconds: float) -> Outcome:
        given[section.letter] = seconds
        return passed(section)

    found = command.check(SECTIONS, 300, gpu=False, named=False, run=run)
    assert [own.status for own in found] == ["PASS"] * 6 + ["SKIPPED"] * 2
    assert "there is no NVIDIA GPU" in capsys.readouterr().out
    # What earlier sections leave of their time goes to the later ones.
    assert given["A"] == pytest.approx(300 * 70 / 300, abs=1) and given["F"] > 295
    assert list(given) == ["A", "B", "C", "D", "E", "F"]


def test_the_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    found = command.check(
        SECTIONS[:2], 0.5, gpu=True, named=False, run=lambda section, _: passed(section)
    )
    assert [own.figure for own in found] == ["no time was left"] * 2


def test_the_ratios_are_over_the_sum_of_the_streams() -> None:
    one = {"base": 10.0, "companion": 2.0, "steered": 12.6, "unsteered": 11.0}
    found = {name: {"16": [ms, ms, 99.0 + ms]} for name, ms in one.items()}
    assert summary(found) == (
        "steered / (base + 2 companions): 16 rows 0.90 (12.60 ms, unsteered / base 1.10)"
    )


def test_the_largest_pair_that_fits_is_measured() -> None:
    eight, three, small = PAIRS
    # The weights as docs/start/real-models.md has them; ours have two tables each.
    assert gib(eight.base, eight.vocabulary) == pytest.approx(14.96, abs=0.01)
    assert [fitting(memory) for memory in (80, 24, 8)] == [eight, three, small]
    assert eight.gib < 46 and three.gib < 23
