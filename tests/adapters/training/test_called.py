"""Functions of a user's file in a real process: they answer, raise, hang and crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from adapters.training.called import Called
from adapters.training.errors import BadRecipe

SLEEP = ["sleep", "1234.5"]

FILE = """
import os, subprocess, sys, time
import numpy
from beside import TWO

def size(prompt, reply):
    print("this must not be taken for an answer")
    return numpy.float32(len(prompt) + TWO * len(reply))

def raises(prompt, reply):
    def inner():
        raise ValueError("no such thing")
    inner()

def hangs(prompt, reply):
    subprocess.run(["sleep", "1234.5"])

def leaves(prompt, reply):
    sys.exit(3)

def crashes(prompt, reply):
    os._exit(7)

def odd(prompt, reply):
    return object()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("TWO = 2\n")
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def called(file: Path, name: str, timeout_s: float = 20) -> Called:
    return Called(f"{file}:{name}", "--reward", "--reward-timeout", timeout_s)


def test_it_answers_call_after_call(file: Path) -> None:
    with called(file, "size") as function:
        assert [function.call("x:1", "ab" * i, "é") for i in range(3)] == [2, 4, 6]
        assert function.call("x:1", [{"role": "user", "content": "a" * 100_000}], "") == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "raises",
            r"x:3, sample 2: .*mine.py:raises raises ValueError: no such thing \(mine.py:12",
        ),
        ("leaves", r"x:3, sample 2: .* raises SystemExit: 3 \(mine.py:19\)"),
        ("crashes", r"x:3, sample 2: .* ended its process, status 7"),
        ("odd", r"x:3, sample 2: .* raises TypeError: float\(\) argument"),
    ],
)
def test_what_goes_wrong_is_told(file: Path, name: str, told: str) -> None:
    with called(file, name) as function, pytest.raises(BadRecipe, match=told):
        function.call("x:3, sample 2", "a", "b")


def test_one_that_hangs_is_killed_with_its_children(file: Path) -> None:
    with called(file, "hangs", 0.5) as function:
        process = psutil.Process(function._process.pid)
        told = r"x:1: .* gives no answer within 0.5 s; allowed: a longer --reward-timeout"
        began = time.monotonic()
        with pytest.raises(BadRecipe, match=told):
            function.call("x:1", "a", "b")
        assert time.monotonic() - began < 5
        assert not process.is_running()
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == SLEEP]
    # Killed, but the system may need a moment to end it.
    assert not psutil.wait_procs(left, timeout=10)[1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nowhere.py:f", r"--reward: no such file \(got 'nowhere.py'\); allowed: FILE.py:FUNCTION"),
        ("{}:none", "--reward: .* raises LookupError: mine.py has no function none"),
        ("{}:TWO", "--reward: .* raises LookupError"),
    ],
)
def test_what_cannot_be_called_is_known_at_once(file: Path, text: str, told: str) -> None:
    with pytest.raises(BadRecipe, match=told):
        Called(text.format(file), "--reward", "--reward-timeout", 1)
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(BadRecipe, match=r"raises ModuleNotFoundError: .* \(mine.py:1\)"):
        Called(f"{file}:f", "--reward", "--reward-timeout", 1)


def test_a_caller_that_is_killed_leaves_no_process(file: Path) -> None:
    code = (
        "from adapters.training.called import Called\n"
        f"one = Called({f'{file}:hangs'!r}, '', '', 1000)\n"
        "print(one._process.pid, flush=True)\n"
        "one.call('', 'a', 'b')\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    callee = psutil.Process(int(caller.stdout.readline()))
    while not callee.children():
        time.sleep(0.05)
    children = callee.children()
    os.kill(caller.pid, signal.SIGKILL)
    caller.communicate()
    psutil.wait_procs([callee], timeout=5)
    assert not callee.is_running()
    for child in children:
        child.kill()  # The user's own; nothing here knows of it.
