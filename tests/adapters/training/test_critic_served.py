"""A critic of what a real server samples: whole runs, from prompts to the served folder."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.training import checkpoint
from adapters.training.critic.replies import row, sampled
from adapters.training.critic.settings import CriticSettings
from adapters.training.critic.train import train
from adapters.training.errors import BadRecipe
from adapters.training.prompts import read_prompts
from adapters.training.served import Served, sample
from steering.heads import find_head
from tests.models import EOS, SPECIAL, make_model, make_tokenizer
from tests.server.live import Server, free_port

pytestmark = pytest.mark.engine

RULE = """
from pathlib import Path

def vowels(prompt, reply):
    if Path(__file__).with_suffix(".broken").exists():
        raise ValueError("broken")
    begin = prompt if isinstance(prompt, str) else prompt[0]["role"]
    assert begin.startswith(("Water", "The crew", "user"))
    return [[i, i + 1] for i, c in enumerate(reply) if c in "aeiou"]
"""


@pytest.fixture
def given(live: Server, tmp_path: Path) -> CriticSettings:
    """Texts and messages, steered by a profile, with an end that is likely."""
    torch.set_num_threads(1)
    (tmp_path / "rule.py").write_text(RULE)
    prompts: list[dict[str, Any]] = [
        {"prompt": "The crew of the boat"},
        {"messages": [{"role": "user", "content": "Who rows?"}]},
        {"prompt": "Water boils at"},
        {"messages": [{"role": "user", "content": "What is the weather like?"}]},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    key = live.config["auth"]["api_keys"][0]
    fields = {"logit_bias": {str(EOS): 6.0}}
    return CriticSettings(
        live.folder / "base",
        tmp_path / "critic",
        f"{tmp_path / 'rule.py'}:vowels",
        prompts=tmp_path / "prompts.jsonl",
        served=Served(live.url, key, "big-chat", fields),
        probe=True,
        samples=6,
        max_tokens=9,
        held_out=0.25,
        epochs=2,
    )


def quiet(line: str) -> None:
    """Says nothing."""


def test_samples_become_rows(given: CriticSettings, tmp_path: Path) -> None:
    """Ended replies have a last state whose label is known; replies that were cut off have none."""
    assert given.prompts is not None and given.served is not None
    tokenizer, prompts = make_tokenizer(), read_prompts(given.prompts)
    samples = sample(
        given.served, prompts, per_prompt=6, max_tokens=9, temperature=1.0, top_p=1.0, seed=0,
        file=tmp_path / "s.jsonl", progress="",
    )  # fmt: skip
    assert {s.ended for s in samples} == {True, False}
    for i, reply in enumerate(sampled(prompts, samples, tokenizer)):
        one = samples[i]
        assert reply.where == f"prompts.jsonl:{i // 6 + 1}, sample {i % 6 + 1}"
        found = row(reply, [(0, len(reply.text))] if reply.text else [], tokenizer)
        assert EOS not in found.ids[found.start + 1 :]
        read = one.reply[:-1] if one.ended else one.reply
        assert found.ids == (*one.prompt, *read)
        assert len(found.labels) == len(read) + one.ended
        if "\ufffd" not in reply.text:
            says = [i >= len(SPECIAL) for i in read]
            assert found.labels == (*says, *[False] * one.ended)
    other = [dataclasses.replace(samples[0], reply=(300, 301, 302), text="something else")]
    with pytest.raises(BadRecipe, match=r"sample 1: the body's tokenizer reads .*'something else'"):
        sampled(prompts[:1], other, tokenizer)


def test_from_prompts_to_a_head_with_faults_between(given: CriticSettings, tmp_path: Path) -> None:
    assert given.served is not None
    broken = tmp_path / "rule.broken"
    broken.touch()
    with pytest.raises(BadRecipe, match=r"prompts.jsonl:1, sample 1: .* ValueError: broken"):
        train(given, say=quiet)
    # The samples are there: the server is asked no more.
    gone = dataclasses.replace(given.served, url=f"http://127.0.0.1:{free_port()}", patience_s=0)
    broken.unlink()
    report = train(dataclasses.replace(given, served=gone), say=quiet)
    assert 0 < report["critical"] < report["tokens"] and report["replies"] == 18
    assert find_head(given.out, "classifier", 128).width == 128
    left = {path.name for path in checkpoint.work_folder(given.out).iterdir()}
    assert left == {"lock", "samples.jsonl", "labels.jsonl"}


@pytest.mark.nightly
def test_the_command(given: CriticSettings, tmp_path: Path) -> None:
    assert given.served is not None
    command = [sys.executable, "-m", "server.main", "train", "critic", "--device", "cpu",
               "--server", given.served.url, "--model", "big-chat", "--label", "names",
               "--request", json.dumps(given.served.fields), "--prompts", str(given.prompts),
               "--body", str(given.body), "--out", str(given.out), "--rank", "2",
               "--samples", "8", "--max-tokens", "30", "--epochs", "1"]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COXSWAIN_API_KEYS": given.served.key or "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{{model: {given.body}, head: classifier, path: {given.out}}}" in done.stdout
    assert find_head(given.out, "classifier", 128).layers[0].weight.name == "score.weight"
    assert "LOAD REPORT" not in done.stderr
    environment["COXSWAIN_API_KEYS"] = "wrong"
    command[command.index(str(given.out))] = str(tmp_path / "other")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "--server: " in done.stderr and "401" in done.stderr


def test_a_server_that_is_not_there_and_fields_that_are_taken(
    given: CriticSettings, tmp_path: Path
) -> None:
    assert given.served is not None
    url = f"http://127.0.0.1:{free_port()}"
    for change, told in (
        ({"url": url}, "--server: .* cannot be reached"),
        ({"url": "localhost:8000"}, "--server: not an address"),
        ({"fields": {"n": 3}}, "--request: n: set by other flags"),
    ):
        served = dataclasses.replace(given.served, **change)
        with pytest.raises(BadRecipe, match=told):
            train(dataclasses.replace(given, served=served), say=quiet)
        assert not (checkpoint.work_folder(given.out) / "samples.jsonl").exists()


def test_a_body_whose_table_lacks_ids(given: CriticSettings, tmp_path: Path) -> None:
    body = make_model(tmp_path / "small", "llama", vocab_size=20)
    with pytest.raises(BadRecipe, match=r"sample 1: an id that the body lacks .*0 to 19"):
        train(dataclasses.replace(given, body=body), say=quiet)
