"""What an engine's processes tell while they start reaches the server, in order and to the end."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from steering.startup import FILE, Stage, listening, report


def _start(count: int) -> None:
    for number in range(1, count + 1):
        report(Stage("loading", f"stream {number}", number, count))


def test_another_process_is_heard_in_order() -> None:
    found: list[Stage] = []
    with listening(found.append):
        engine = multiprocessing.get_context("spawn").Process(target=_start, args=(3,))
        engine.start()
        engine.join()
        report(Stage("compiled", "a\nb", 3, 3, 1.5))  # just before the end
    wanted = [Stage("loading", f"stream {n}", n, 3) for n in (1, 2, 3)]
    assert found == [*wanted, Stage("compiled", "a\nb", 3, 3, 1.5)]


def test_nobody_listens_before_and_after() -> None:
    found: list[Stage] = []
    report(Stage("loading", "base", 1, 1))
    with pytest.raises(ValueError, match="the engine"), listening(found.append):
        raise ValueError("the engine failed")
    assert FILE not in os.environ
    report(Stage("loading", "base", 1, 1))
    assert not found
