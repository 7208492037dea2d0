"""Whole runs on tiny models: what is written is served, resumes to the same bits, learns."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from adapters.training.critic import train as critic
from adapters.training.critic.classifiers import Row, features, load_body
from adapters.training.critic.measures import measures
from adapters.training.critic.replies import Reply, row
from adapters.training.critic.settings import CriticSettings
from adapters.training.critic.train import REPORT, train
from steering.heads import HeadFile, body_architecture, find_head, is_head
from tests.adapters.models import Applied, adapted
from tests.adapters.training.critic_runs import bits, quiet, tagged
from tests.models import make_model, make_tokenizer

pytestmark = pytest.mark.slow


def read(head: HeadFile, hidden: torch.Tensor) -> torch.Tensor:
    """[N] float64 logits of a head on [N, H], from its file."""
    x = hidden.double()
    for i, layer in enumerate(head.layers):
        tensors = load_file(layer.weight.file)
        assert layer.bias is not None
        x = getattr(torch, head.activation)(x) if i else x
        x = x @ tensors[layer.weight.name].double().T + tensors[layer.bias.name].double()
    return x[:, 0]


def flat(found: dict[str, Any]) -> list[float]:
    """The numbers of `measures`."""
    lines = [found[key] for key in ("tokens", "critical", "auc")]
    return lines + [value for line in found["thresholds"] for value in line.values()]


def slow_rows(data: Path) -> list[tuple[list[int], list[bool]]]:
    """Per line: all ids, and the labels of the states from the prompt's last token on.

    The slow way: the tokenizer's offsets, character by character.
    """
    tokenizer, found = make_tokenizer(), []
    for entry in map(json.loads, data.read_text().splitlines()):
        if "messages" in entry:
            ids = tokenizer.apply_chat_template(
                entry["messages"], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer(entry["prompt"])["input_ids"]
        text = entry["completion"]
        coded = tokenizer(text, return_offsets_mapping=True)
        marked = {i for start, end in entry["spans"] for i in range(start, end)}
        shown = {i for i, c in enumerate(text) if c != " "}
        labels = [bool(marked & shown & set(range(*o))) for o in coded["offset_mapping"]]
        found.append(([*ids, *coded["input_ids"]], [*labels, False]))
    return found


@pytest.mark.parametrize("hidden", [None, 24])
def test_a_probe_is_what_is_served_on_base_and_adapter(
    made: CriticSettings, tmp_path: Path, hidden: int | None
) -> None:
    """The report's numbers come out of the written head on PEFT's hidden states."""
    settings = dataclasses.replace(
        made, out=tmp_path / "critic", hidden=hidden, held_out=0.4, epochs=30
    )
    report = train(settings, say=quiet)
    head = find_head(settings.out, "classifier", 128)
    assert (len(head.layers), head.rows, head.width) == (1 if hidden is None else 2, "one", 128)
    assert made.adapter is not None and made.data is not None
    model = adapted(made.body, (Applied(made.adapter),))
    scores, targets = [], []
    entries = [json.loads(line) for line in made.data.read_text().splitlines()]
    replies = [Reply("", e.get("prompt") or e["messages"], (), (), "", True) for e in entries]
    _, held = critic._split(replies, 0.4, settings.seed)
    for i in held:
        ids, labels = slow_rows(made.data)[i]
        with torch.inference_mode():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        scores.append(read(head, states[-len(labels) :]))
        targets += labels
    found = measures(torch.cat(scores), torch.tensor(targets))
    assert flat(report["held_out"]) == pytest.approx(flat(found))
    assert found["auc"] > 0.8 and 0.1 < found["critical"] < 0.4


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "opt"])
def test_states_are_the_last_hidden_states_whatever_the_batch(
    tmp_path: Path, architecture: str
) -> None:
    body = make_model(tmp_path / "body", architecture, seed=7)
    rng = random.Random(2)
    ids = [tuple(rng.randrange(7, 400) for _ in range(n)) for n in (9, 3, 17, 5)]
    rows = [Row(i, len(i) - 3, (True, False, False)) for i in ids]

    class Bar:
        def update(self, n: int) -> None: ...

    found = features(load_body(body, None, "float32", "cpu"), rows, 3, "cpu", Bar())
    model = AutoModelForCausalLM.from_pretrained(body, dtype=torch.float32).eval()
    for one, states in zip(rows, found, strict=True):
        with torch.inference_mode():
            out = model(torch.tensor([one.ids]), output_hidden_states=True)
            # What the unembedding gets is what `compute_logits` gets.
            scores = model.get_output_embeddings()(states)
        torch.testing.assert_close(states, out.hidden_states[-1][0, -3:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores, out.logits[0, -3:], rtol=1e-4, atol=1e-4)


def rows_of(made: CriticSettings) -> list[Row]:
    """All rows, the slow way."""
    assert made.data is not None
    return [
        Row(tuple(ids), len(ids) - len(labels), tuple(labels))
        for ids, labels in slow_rows(made.data)
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_token_classifier_is_what_transformers_loads(
    made: CriticSettings, tmp_path: Path, architecture: str, rank: int | None
) -> None:
    body = make_model(tmp_path / "body", architecture, seed=5)
    settings = tagged(
        made, tmp_path / "critic", body=body, rank=rank, held_out=0.4, epochs=25, rate=1e-2
    )
    report = train(settings, say=quiet)
    width = 64 if architecture == "gpt2" else 128
    head = find_head(settings.out, "classifier", width)
    assert len(head.layers) == 1 and is_head(head.layers[0].weight.name)
    if rank is None:
        model: Any = AutoModelForTokenClassification.from_pretrained(settings.out).eval()
        config = json.loads((settings.out / "config.json").read_text())
        language = json.loads((body / "config.json").read_text())["architectures"][0]
        assert body_architecture(config["architectures"][0]) == language
        assert (settings.out / "tokenizer.json").is_file()
    else:
        model = AutoModelForCausalLM.from_pretrained(body, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, settings.out).eval()
    rows, targets = rows_of(made), list[bool]()
    scores = []
    assert made.data is not None
    entries = [json.loads(line) for line in made.data.read_text().splitlines()]
    replies = [Reply("", e.get("prompt") or e["messages"], (), (), "", True) for e in entries]
    for one in (rows[i] for i in critic._split(replies, 0.4, settings.seed)[1]):
        with torch.inference_mode():
            out = model(torch.tensor([one.ids]), output_hidden_states=True)
        states = out.hidden_states[-1][0, one.start :]
        scores.append(out.logits[0, one.start :, 0] if rank is None else read(head, states))
        targets += one.labels
    found = measures(torch.cat(scores), torch.tensor(targets))
    assert flat(report["held_out"]) == pytest.approx(flat(found))
    assert found["auc"] > 0.9


def test_what_a_row_is() -> None:
    """The state that reads the prompt's last token belongs to the reply's first token."""
    tokenizer = make_tokenizer()
    ids = tuple(tokenizer("12 pears")["input_ids"])
    reply = Reply("x", "", (7, 8, 9), ids, "12 pears", True)
    found = row(reply, [(0, 2)], tokenizer)
    assert found.ids == (7, 8, 9, *ids) and found.start == 2
    digits = [tokenizer.decode([i]).strip().isdigit() for i in ids]
    assert found.labels == (*digits, False) and sum(digits) in (1, 2)
    cut = row(dataclasses.replace(reply, ended=False), [(0, 2)], tokenizer)
    assert cut.labels == tuple(digits)


def test_the_rule_of_a_file_and_ready_spans_train_the_same_bits(
    made: CriticSettings, whole: dict[str, str], tmp_path: Path
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "critic", label="data")
    train(settings, say=quiet)
    assert bits(settings.out).items() >= {k: v for k, v in whole.items() if k != REPORT}.items()
    assert (whole.keys() == {"config.json", "model.safetensors", REPORT}) and made.probe


def test_prompts_are_held_out_whole(made: CriticSettings) -> None:
    replies = [Reply("", f"prompt {i % 10}", (), (), "", True) for i in range(30)]
    kept, held = critic._split(replies, 0.2, 3)
    assert sorted(kept + held) == list(range(30)) and len(held) == 6
    assert not {i % 10 for i in kept} & {i % 10 for i in held}
    assert critic._split(replies, 0.2, 4) != (kept, held) == critic._split(replies, 0.2, 3)
    assert critic._split(replies, 0.0, 3) == (list(range(30)), [])
    assert len(critic._split(replies, 0.99, 3)[0]) == 3


def test_the_weight_of_critical_tokens_raises_their_probability(
    made: CriticSettings, tmp_path: Path
) -> None:
    recall = []
    for weight in (0.05, 1.0, "auto"):
        settings = dataclasses.replace(
            made, out=tmp_path / f"{weight}", pos_weight=weight, epochs=3, batch=4, held_out=0.5
        )
        recall.append(train(settings, say=quiet)["held_out"]["thresholds"][1]["recall"])
    assert recall == sorted(recall) and recall[0] < recall[-1]
