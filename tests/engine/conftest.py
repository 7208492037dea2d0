"""Real engines for the exactness tests. One lives at a time: they share this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.engine.driver import STREAMS, Engine
from tests.models import VOCAB_SIZE


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A Llama with companions of four other architectures and a twin; long prompts in chunks.

    One companion lacks the tokenizer's last 10 ids.
    """
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE),
        STREAMS,
        one_product=[["chat", "plain"], ["third", "twin"]],
    )
    yield found
    del found
    gc.collect()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the README's table of figures quotes."""
    from tests.engine.driver import ERRORS

    if ERRORS:
        terminalreporter.write_line(
            f"engine against transformers, float32: {len(ERRORS)} log-probabilities compared, "
            f"largest error {max(ERRORS):.1e}"
        )
