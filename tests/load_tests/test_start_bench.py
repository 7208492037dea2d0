"""The start's benchmark reads the server's own log and asks what the server says one may ask."""

from __future__ import annotations

import json

import pytest

from load_tests.start_bench import first_token, stage


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("coxswain: loading vLLM … 0 s\n", "loading vLLM"),
        ("coxswain: loading models: base, chat … 10 s\n", "loading models"),
        ("coxswain: loading adapters: 3 of 5 … 12 s\n", "loading adapters"),
        ("coxswain: ready after 14.5 s\n", None),
        ("coxswain: opening http://127.0.0.1:8000; model runner V1\n", None),
        ("something else … 3 s\n", None),
    ],
)
def test_a_stage_is_read_from_its_line(line: str, name: str | None) -> None:
    assert stage(line) == name


@pytest.mark.engine
def test_the_first_token_of_what_the_server_says_one_may_ask(zoo: str) -> None:
    body = {"model": "chat", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello!"}]}
    line = f"  try       curl {zoo}/v1/chat/completions -H 'X: y' -d '{json.dumps(body)}'"
    assert 0 < first_token(line) < 60
