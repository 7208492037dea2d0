"""Examples become the tokens that the base's template makes of them, and bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.training.data import IGNORED, Encoder, Example, Tokens, read_examples
from adapters.training.errors import BadRecipe
from tests.models import make_tokenizer


def chat(*texts: str, where: str = "x:1") -> Example:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Example(where, messages=tuple(messages))


def learned(tokens: Tokens) -> str:
    """The text whose tokens have labels."""
    text: str = make_tokenizer().decode([t for t in tokens.labels if t != IGNORED])
    return text


ENCODER = Encoder(make_tokenizer(), None, 60)


def test_only_replies_are_learned_and_every_token_has_its_member() -> None:
    parts = [(2, chat("What is it?", "A boat.")), (0, chat("Who rows?", "The crew does."))]
    tokens = ENCODER.row(parts)
    assert learned(tokens) == "A boat.<|end|>The crew does.<|end|>"
    text = "<|user|>What is it?<|assistant|>A boat.<|end|>".replace("?<", "?<|end|><")
    size = len(make_tokenizer()(text)["input_ids"])
    assert tokens.members == [2] * size + [0] * (len(tokens.ids) - size)
    assert make_tokenizer().decode(tokens.ids).startswith(text)
    assert all(label in (IGNORED, i) for i, label in zip(tokens.ids, tokens.labels, strict=True))


def test_a_completion_ends_with_the_end_token() -> None:
    tokens = ENCODER.row([(1, Example("x:1", prompt="Who rows? ", completion="The crew."))])
    assert learned(tokens) == " The crew.</s>"  # The space is part of the first word's token.
    assert set(tokens.members) == {1}


def test_what_is_too_long_is_left_out_of_a_row_and_refused_alone() -> None:
    long = chat("What?", "boat " * 80, where="sum.jsonl:7")
    row = ENCODER.row([(0, chat("Who?", "Me.")), (1, long)])
    assert set(row.members) == {0}
    with pytest.raises(BadRecipe, match=r"sum.jsonl:7: too long \(got '\d+ tokens'\).*≤ 60"):
        ENCODER.check(long)


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(BadRecipe, match="rewrites earlier messages"):
        Encoder(make_tokenizer(), template, 60).check(chat("Who?", "Me."))


BAD: list[tuple[Any, str]] = [
    ("{", "x.jsonl:2: not JSON"),
    ([1], "x.jsonl:2: not an example"),
    ({"text": "a"}, r"x.jsonl:2: not an example \(got \['text'\]\); allowed: an object with"),
    ({"prompt": "a", "completion": 3}, r"x.jsonl:2: completion: not a text \(got 3\)"),
    ({"prompt": "", "completion": "a"}, "x.jsonl:2: prompt: not a text"),
    ({"messages": "a"}, "x.jsonl:2: messages: not a list"),
    ({"messages": []}, "no reply to learn"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no reply to learn"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: not a message"),
    (
        {"messages": [{"role": "robot", "content": "a"}]},
        r"messages\[0\].role: unknown role.*'robot'",
    ),
    ({"messages": [{"role": "assistant", "content": 1}]}, r"messages\[0\].content: not a text"),
]


@pytest.mark.parametrize(("line", "told"), BAD)
def test_a_bad_line_is_named_with_its_field_and_value(tmp_path: Path, line: Any, told: str) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "x.jsonl").write_text(f"{good}\n{text}\n")
    with pytest.raises(BadRecipe, match=told):
        read_examples(tmp_path / "x.jsonl")


def test_files_that_are_missing_or_empty_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"gone.jsonl: cannot be read"):
        read_examples(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadRecipe, match=r"empty.jsonl: has no examples"):
        read_examples(tmp_path / "empty.jsonl")
