"""vLLM's error texts in our words, held against vLLM's source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs

from server.errors import TOO_LONG, from_vllm, in_the_request_s_words
from server.vllm_words import _SETTINGS, in_our_words, is_too_long, own_names

ROOT = Path(vllm.__file__).parent
REACHED = (
    "entrypoints/openai", "entrypoints/generate/base", "entrypoints/serve/engine",
    "entrypoints/serve/tokenize", "entrypoints/serve/utils/api_utils.py", "renderers",
    "v1/engine/input_processor.py", "sampling_params.py", "exceptions.py", "tool_parsers",
)  # fmt: skip
"""Where errors of our routes come from."""

APART = ("VLLM_ENABLE_RESPONSES_API_STORE", "Cohere-only")
"""`background` is refused before vLLM sees it; the tokenizer mode `cohere` is not served."""

FOREIGN = re.compile(r"--[a-z]+(?:-[a-z]+)+|VLLM_[A-Z0-9_]+")


def text_of(node: ast.AST) -> str:
    """A string of the source; `7` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "7" for part in node.values)
    return ""


def errors_of(file: Path) -> Iterator[str]:
    """Strings inside calls that make errors, and those that are named for one."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.endswith(("Error", "Exception")) or name == "create_error_response":
                yield from filter(None, map(text_of, ast.walk(node)))
        elif isinstance(node, ast.Assign) and any(
            "error" in getattr(target, "id", "").lower() for target in node.targets
        ):
            yield from filter(None, map(text_of, ast.walk(node.value)))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every error's text that a client may get."""
    files = [
        file
        for name in REACHED
        for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    found = [text for file in files for text in errors_of(file)]
    assert len(found) > 300
    return found


def test_no_error_tells_people_to_use_what_they_do_not_have(texts: list[str]) -> None:
    settings = {field.name for field in fields(AsyncEngineArgs)}
    foreign = [text for text in texts if FOREIGN.search(text)]
    assert len(foreign) > 10
    for text in foreign:
        own = in_our_words(text)
        if any(name in text for name in APART):
            continue
        assert not FOREIGN.search(own), (text, own)
        assert set(re.findall(r"`engine\.([a-z_]+)`", own)) <= settings, (text, own)


@pytest.mark.parametrize("theirs", _SETTINGS)
def test_each_text_of_the_table_is_vllm_s(texts: list[str], theirs: str) -> None:
    assert any(theirs in text for text in texts)


LENGTHS = (
    "This model's maximum context length is 7 tokens. However, your prompt contains 7 characters",
    "exceeds the max_model_len 7. Please reduce prompt.",
    "Input length (7) exceeds model's maximum context length (7).",
    "requested output tokens (at least 1) is longer than the maximum model length of 7.",
    "prompt (length 7) is longer than the maximum model length of 7.",
    "7=7 cannot be greater than 7=7. Please request fewer output tokens.",
)


@pytest.mark.parametrize("length", LENGTHS)
def test_each_text_about_the_context_is_vllm_s_and_is_known(texts: list[str], length: str) -> None:
    (found,) = {max((text for text in texts if length in text), key=len)}
    filled = found.replace("7=7 cannot be greater than 7=7", "max_tokens=7 cannot be greater than "
                           "max_model_len=7")  # fmt: skip
    assert is_too_long(filled)
    error = from_vllm({"message": filled, "code": 400, "param": None})
    assert error.code == TOO_LONG


@pytest.mark.parametrize(
    ("theirs", "own"),
    [("input_text", "messages"), ("input_tokens", "messages"),
     ("max_tokens", "max_completion_tokens"), ("logprobs", "top_logprobs"), ("seed", "seed")],
)  # fmt: skip
def test_fields_are_the_request_s_own(theirs: str, own: str) -> None:
    names = own_names("messages", "max_completion_tokens", "top_logprobs")
    error = from_vllm({"message": f"{theirs} must be at least 1", "code": 400, "param": theirs})
    found = in_the_request_s_words(error, names)
    assert (found.param, found.message) == (own, f"{own} must be at least 1")
