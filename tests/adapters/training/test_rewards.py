"""Rewards by functions, classifiers and servers: what they give, and what is told and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from adapters.training.errors import BadRecipe
from adapters.training.prompts import Prompt
from adapters.training.served import Sample
from adapters.training.value.rewards import opened, rewards
from tests.adapters.training.endpoint import Answer, endpoint, hang_up, status
from tests.models import make_model, make_tokenizer
from tests.server.live import free_port

PROMPTS = [
    Prompt("x:1", {"prompt": "The crew of the boat"}),
    Prompt("x:4", {"messages": [{"role": "user", "content": "Who rows?"}]}),
]
SAMPLES = [Sample((7, i), (9, 2), text, True) for i, text in enumerate(["a", "rows", "", "on"])]


def give(text: str, file: Path, timeout_s: float = 20, samples: list[Sample] = SAMPLES) -> Any:
    with opened(text, timeout_s, "cpu") as reward:
        return rewards(reward, text, PROMPTS, samples, file)


FUNCTION = """
def size(prompt, reply):
    assert isinstance(prompt, str) or prompt[0]["role"] == "user"
    with open("{log}", "a") as log:
        log.write(reply + "\\n")
    {broken}
    return len(reply) + (100 if isinstance(prompt, list) else 0)
"""


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("assert reply", r"x:4, sample 1: .*fun.py:size raises AssertionError \(fun.py:6\)"),
        ("import time; reply or time.sleep(99)", "x:4, sample 1: .* gives no answer within 1 s"),
        ("if not reply: return float('nan')", r"x:4, sample 1: .*not a finite number \(got nan"),
        ("if not reply: return None", r"x:4, sample 1: the reward is not a finite number .*None"),
    ],
)
def test_a_function_that_fails_is_mended_and_the_rest_is_kept(
    tmp_path: Path, broken: str, told: str
) -> None:
    log, file = tmp_path / "log", tmp_path / "work" / "rewards.jsonl"
    (tmp_path / "fun.py").write_text(FUNCTION.format(log=log, broken=broken))
    text = f"{tmp_path}/fun.py:size"
    with pytest.raises(BadRecipe, match=told):
        give(text, file, 1)
    assert len(file.read_text().splitlines()) == 2
    (tmp_path / "fun.py").write_text(FUNCTION.format(log=log, broken="pass"))
    assert give(text, file) == [1, 4, 100, 102]
    assert log.read_text().splitlines() == ["a", "rows", "", "", "on"]
    assert give(text, file) == [1, 4, 100, 102]
    assert len(log.read_text().splitlines()) == 5
    with pytest.raises(BadRecipe, match="holds rewards of other samples"):
        give(text, file, samples=SAMPLES[::-1])


def fill(model: PreTrainedModel) -> PreTrainedModel:
    random = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=random)
    return model.eval()


def bert(folder: Path, labels: int) -> Path:
    config = BertConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, num_labels=labels,
    )  # fmt: skip
    fill(BertForSequenceClassification(config)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def llama(folder: Path, labels: int) -> Path:
    make_model(folder, "llama")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    fill(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("labels", [1, 2])
def test_a_classifier_reads_prompt_and_reply(tmp_path: Path, labels: int) -> None:
    """BERT has no chat template, a Llama has one and its padding is an ordinary id here."""
    tokenizer = make_tokenizer()
    for make in (bert, llama):
        folder = make(tmp_path / make.__name__, labels)
        found = give(str(folder), tmp_path / f"{make.__name__}.jsonl")
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        model.config.pad_token_id = None
        wanted = []
        for i, one in enumerate(SAMPLES):
            if i < 2 or make is bert:
                first = "The crew of the boat" if i < 2 else "Who rows?"
                ids = tokenizer(first)["input_ids"] + tokenizer(one.text)["input_ids"]
            else:
                text = f"<|user|>Who rows?<|end|><|assistant|>{one.text}<|end|>"
                ids = tokenizer(text)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].double()
            wanted.append(float(logits[1] - logits[0] if labels == 2 else logits[0]))
        assert found == pytest.approx(wanted, abs=1e-5)
        assert len(set(found)) == len(found)


def test_texts_longer_than_the_classifier_reads_are_named(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert", 1)
    long = [*SAMPLES[:3], Sample((7,), (9,), "boat " * 50, True)]
    with pytest.raises(BadRecipe, match=r"x:4, sample 2: longer than the reward model reads.*≤ 40"):
        give(str(folder), tmp_path / "r.jsonl", samples=long)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 3


def pickled(folder: Path) -> str:
    bert(folder, 1)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return str(folder)


def plain(folder: Path) -> str:
    return str(make_model(folder, "llama"))


def three(folder: Path) -> str:
    return str(bert(folder, 3))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (pickled, "--reward .*: no model; allowed: .*safetensors"),
        (plain, r"--reward .*: not a classifier of sequences \(got 'LlamaForCausalLM'\)"),
        (three, r"--reward .*: labels cannot be used \(got 3\); allowed: 1 or 2"),
        (lambda folder: "gone/folder", r"--reward: no such reward \(got 'gone/folder'\)"),
        (lambda folder: f"{folder}.py:f", "--reward: no such file"),
        (lambda folder: "http:///x", "--reward: not an address"),
        (lambda folder: f"http://127.0.0.1:{free_port()}", "--reward: cannot be reached"),
    ],
)
def test_what_cannot_be_a_reward_is_known_before(
    tmp_path: Path, make: Callable[[Path], str], told: str
) -> None:
    with pytest.raises(BadRecipe, match=told):
        give(make(tmp_path / "thing"), tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def sized(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    asked = json.loads(body)
    extra = 100 if isinstance(asked["prompt"], list) else 0
    status(200, {"reward": len(asked["reply"]) + extra})(handler, body)


def test_a_server_gives_rewards_through_a_bad_moment(tmp_path: Path) -> None:
    first = [hang_up, status(503, {"error": {"message": "busy"}}), status(500, None)]
    with endpoint(first, sized) as (url, when):
        assert give(f"{url}/score", tmp_path / "r.jsonl") == [1, 4, 100, 102]
        assert len(when) == len(SAMPLES) + len(first)
        assert give(f"{url}/score", tmp_path / "r.jsonl") == [1, 4, 100, 102]
        assert len(when) == len(SAMPLES) + len(first)


def at_nothing(answer: Answer) -> Answer:
    """For an empty reply only."""
    return lambda handler, body: (sized if json.loads(body)["reply"] else answer)(handler, body)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (at_nothing(lambda *_: time.sleep(2)), r"x:4, sample 1: http.* no answer within 0.4 s"),
        (at_nothing(hang_up), "x:4, sample 1: http.*cannot be reached"),
        (at_nothing(status(200, {"score": 1})), r"x:4, sample 1: the answer has no reward"),
        (at_nothing(status(200, {"reward": "1"})), r"x:4, sample 1: .* finite number \(got '1'\)"),
        (at_nothing(status(422, {"error": {"message": "no"}})), "x:4, sample 1: .* 422: no"),
    ],
)
def test_a_server_that_fails_is_named_and_the_rest_is_kept(
    tmp_path: Path, answer: Answer, told: str
) -> None:
    file = tmp_path / "r.jsonl"
    with endpoint([], answer) as (url, _), pytest.raises(BadRecipe, match=told):
        give(url, file, 0.4)
    assert file.exists()
