"""Without the emulation nothing here can run; `tests/test_emulated.py` starts the process."""

from __future__ import annotations

import sys

import pytest

collect_ignore_glob = [] if "tests.emulated.plugin" in sys.modules else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many log-probabilities were compared, and the largest error."""
    if collect_ignore_glob:
        return
    from tests.engine import conftest

    conftest.pytest_terminal_summary(terminalreporter)
