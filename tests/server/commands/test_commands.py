"""The commands that need no engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.console import table
from server.main import run


def test_methods_lists_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods"]) == 0
    told = capsys.readouterr().out
    assert "proxy_tuning  (coxswain" in told
    assert "strength:" in told
    assert run(["methods", "--allow", "no-such-package"]) == 1


def test_profiles_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: a\nprofiles: {p: {method: mix, weights: {base: 1}}}\n")
    assert run(["profiles", "list", str(file)]) == 0
    assert "mix" in capsys.readouterr().out
    assert run(["profiles", "list", str(file), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["profiles"]
    assert found == {"name": "p", "origin": "config", "method": "mix", "weights": {"base": 1}}


def test_problems_are_lines_not_tracebacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ["--url", "http://127.0.0.1:9"]
    asked = (["profiles", "list", str(tmp_path / "gone.yaml")], ["profiles", "list", *nowhere],
             ["adapters", "list", *nowhere], ["status", *nowhere], ["drain", *nowhere],
             ["status", "--url", "http://["])  # fmt: skip
    for argv in asked:
        assert run(argv) == 1
        assert capsys.readouterr().err.count("coxswain: ") == 1


def test_a_table_shows_names_as_they_are_and_a_row_in_a_line() -> None:
    lines = table([("adapter", "source"), ("[red]x[/red]", "s" * 300), ("読", "")]).splitlines()
    assert len(lines) == 4 and lines[0].split() == ["adapter", "source"]
    assert lines[2].split() == ["[red]x[/red]", "s" * 300] and lines[3] == "読"


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    for words in ("coxswain serve zoo.yaml --port 9000", "proxy_tuning", "COXSWAIN_API_KEYS"):
        assert words in told


def test_reference_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reference"]) == 0
    assert capsys.readouterr().out.startswith("# Configuration")
