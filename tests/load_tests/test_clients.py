"""The clients' table, and what runs their checks; the clients themselves are `make clients`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from load_tests.clients import environment
from load_tests.clients.__main__ import CLIENTS, CONFIG, HERE, PAGE, asked
from load_tests.clients.asking import cut, is_right, stops
from load_tests.clients.checks import Checks, refused
from load_tests.clients.outcomes import BEGIN, END, Outcome, all_good, into, read, shown, table
from server.settings.file import load

FOLDER = CONFIG.parent
GOOD = Outcome("openai", "3", "chat", seconds=0.5)
BAD = Outcome("litellm", "1", "tools | streamed", "Error:\n <b>" + "x" * 400)


def test_an_outcome_survives_its_line() -> None:
    assert read(BAD.line()) == BAD and "\n" not in BAD.line()


def test_the_table_says_what_failed_and_why() -> None:
    lines = table([GOOD, BAD]).splitlines()
    assert lines[0] == "2 clients, 2 checks, 1 failed."
    assert lines[4] == "| openai | 3 | chat | ok |"
    assert lines[5].startswith("| litellm | 1 | tools \\| streamed | **failed**: Error: &lt;b>xxx")
    assert lines[5].endswith("x… |")
    assert "FAILED" in shown(BAD) and shown(GOOD).endswith("ok")


def test_the_page_keeps_what_stands_around_the_table() -> None:
    page = into(f"head\n{BEGIN}\nold\n{END}\nfoot\n", [GOOD], "Two cores.")
    assert page.startswith("head\n") and page.endswith("foot\n")
    assert "old" not in page and "Two cores." in page
    assert into(page, [GOOD], "Two cores.") == page
    assert BEGIN in PAGE.read_text() and END in PAGE.read_text()


def test_no_outcome_is_no_success() -> None:
    assert all_good([GOOD]) and not all_good([GOOD, BAD]) and not all_good([])


def test_checks_report_each_failure(capfd: pytest.CaptureFixture[str]) -> None:
    check = Checks("pytest", "pytest", limit_s=1)

    @check("fine")
    def fine() -> None:
        print("a client prints as it likes")

    @check("wrong")
    def wrong() -> None:
        assert 1 + 1 == 3, "no sum"

    @check("asynchronous")
    async def asynchronous() -> None:
        await asyncio.sleep(0)
        raise ValueError("late")

    @check("for ever")
    def for_ever() -> None:
        time.sleep(30)

    with pytest.raises(ValueError, match="two checks"):
        check("fine")(fine)
    assert check.run() == 0
    found = [read(line) for line in capfd.readouterr().out.splitlines()]
    assert [one.what for one in found] == ["fine", "wrong", "asynchronous", "for ever"]
    assert [one.good for one in found] == [True, False, False, False]
    assert "no sum" in found[1].reason and found[2].reason == "ValueError: late"
    assert "no end after 1 s" in found[3].reason


def _raised(error: Exception | None) -> None:
    if error is not None:
        raise error


def test_refused_wants_the_class_and_the_words() -> None:
    with refused(KeyError, "name") as found:
        _raised(KeyError("name"))
    assert isinstance(found.error, KeyError)
    with pytest.raises(AssertionError, match="nothing was raised"), refused(KeyError):
        _raised(None)
    with pytest.raises(AssertionError, match="does not say"), refused(KeyError, "other"):
        _raised(KeyError("name"))
    with pytest.raises(ValueError, match="another"), refused(KeyError):
        _raised(ValueError("another"))


def test_a_client_that_breaks_is_a_failed_check(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{GOOD.line()}'\necho broken >&2\nexit 3\n")
    program.chmod(0o755)
    first, last = asked("openai", program, "http://127.0.0.1:1")
    assert first == GOOD
    assert not last.good and "status 3: broken" in last.reason


def test_what_clients_are_asked() -> None:
    assert len(stops("a", 16)) == 16 and stops("a", 5)[-1] == "a"
    assert cut("one two three") == ("two", "one ")
    assert is_right({"colour": "red", "sure": True})
    assert not is_right({"colour": "pink", "sure": True})
    assert not is_right({"colour": "red", "sure": True, "more": 1})


def test_every_client_has_checks_and_a_pinned_version() -> None:
    assert {file.stem.removeprefix("with_") for file in FOLDER.glob("with_*.py")} == set(CLIENTS)
    lines = [line for line in environment.REQUIREMENTS.read_text().splitlines() if line[0] != "#"]
    assert len(lines) == len(set(CLIENTS) - HERE) and all("==" in line for line in lines)


def test_the_server_has_the_keys_that_the_checks_use() -> None:
    config = load(CONFIG, {})
    assert len(config.auth.api_keys) == 3 and config.chat.tool_call_parser == "hermes"


def test_checks_need_nothing_of_the_server() -> None:
    """They run where none of the project's dependencies are."""
    code = (
        "import sys\n"
        "import load_tests.clients.asking, load_tests.clients.checks\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('server', 'steering', 'vllm')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
