"""Real engines for the exactness tests. One lives at a time: they share this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.engine.driver import Engine
from tests.models import VOCAB_SIZE


@pytest.fixture(scope="package")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A Llama with companions of four other architectures and a twin; long prompts in chunks.

    One companion lacks the tokenizer's last 10 ids.
    """
    streams: dict[str, tuple[str, int] | str] = {
        "chat": ("qwen2", VOCAB_SIZE),
        "third": ("qwen3", VOCAB_SIZE),
        "plain": ("gpt2", VOCAB_SIZE),
        "opt": ("opt", VOCAB_SIZE),
        "short": ("llama", VOCAB_SIZE - 10),
        "twin": "base",
    }
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE),
        streams,
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
