"""Whole runs against a real server: they learn, resume to the same bits, and refuse early."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import AdapterError
from adapters.training import checkpoint
from adapters.training.errors import BadRecipe
from adapters.training.served import Served
from adapters.training.value import train as value
from adapters.training.value.settings import ValueSettings
from adapters.training.value.train import train
from server.main import run
from tests.models import make_model
from tests.server.live import Server, free_port

pytestmark = pytest.mark.engine

FUNCTION = """
def vowels(prompt, reply):
    return sum(reply.count(v) for v in "aeiou") / 4 + len(str(prompt)) / 40
"""


@pytest.fixture(scope="module")
def made(live: Server, tmp_path_factory: pytest.TempPathFactory) -> ValueSettings:
    """Prompts of both kinds, a function, and a few steps on the `plain` companion."""
    folder = tmp_path_factory.mktemp("value")
    torch.set_num_threads(1)
    places = ["river", "mill", "bridge", "stern", "crew", "wind", "water", "basket", "page", "lane"]
    lines: list[dict[str, Any]] = [
        {"prompt": f"The {place} of the" + " boat" * (i % 4)} for i, place in enumerate(places)
    ]
    lines += [{"messages": [{"role": "user", "content": f"Where is the {p}?"}]} for p in places]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "fun.py").write_text(FUNCTION)
    return ValueSettings(
        Served(live.url, live.config["auth"]["api_keys"][0]),
        folder / "prompts.jsonl",
        f"{folder}/fun.py:vowels",
        live.folder / "plain",
        folder / "out",
        samples=4,
        max_tokens=10,
        batch=16,
        rate=1e-3,
        save_every=2,
    )


def quiet(line: str) -> None:
    """Says nothing."""


def bits(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(made: ValueSettings) -> dict[str, str]:
    """The files of an uninterrupted run; its samples and rewards stay beside them."""
    train(made, say=quiet)
    return bits(made.out)


def again(made: ValueSettings, folder: Path, **change: Any) -> ValueSettings:
    """Another run with the samples and rewards of the first one."""
    work = checkpoint.work_folder(folder / "out")
    work.mkdir()
    for name in (value.SAMPLES, value.REWARDS):
        shutil.copyfile(checkpoint.work_folder(made.out) / name, work / name)
    return dataclasses.replace(made, out=folder / "out", **change)


def test_a_run_leaves_the_model_and_what_it_was_fitted_to(
    made: ValueSettings, whole: dict[str, str]
) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names <= whole.keys() and {Path(n).suffix for n in whole} <= {
        ".json", ".safetensors", ".jinja",
    }  # fmt: skip
    left = {p.name for p in checkpoint.work_folder(made.out).iterdir()}
    assert left == {"lock", value.SAMPLES, value.REWARDS}
    told = json.loads((made.out / "training.json").read_text())
    given = [
        json.loads(line)["reward"]
        for line in (checkpoint.work_folder(made.out) / value.REWARDS).read_text().splitlines()
    ]
    assert len(given) == 80 and min(given) < told["rewards"]["mean"] < max(given)


def test_other_settings_fit_to_the_same_samples_without_a_server(
    made: ValueSettings, whole: dict[str, str], tmp_path: Path
) -> None:
    gone = Served(f"http://127.0.0.1:{free_port()}")
    settings = again(made, tmp_path, served=gone, seed=made.seed)
    train(settings, say=quiet)
    assert bits(settings.out) == whole


@pytest.mark.parametrize("last", [2, 4, 10])
def test_a_resumed_fit_ends_with_the_same_bits(
    made: ValueSettings,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last: int,
) -> None:
    settings, save = again(made, tmp_path), checkpoint.save

    def dying(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    with pytest.raises(BadRecipe, match=r"--rate: differs from the unfinished run \(got 0.1\)"):
        train(dataclasses.replace(settings, rate=0.1), say=quiet)
    told: list[str] = []
    train(settings, say=told.append)
    assert f"resumed after step {last} of 10" in told
    assert bits(settings.out) == whole


def arguments(settings: ValueSettings) -> list[str]:
    """The run as a command line."""
    found = ["train", "value", "--server", settings.served.url, "--key", str(settings.served.key)]
    keys = ("prompts", "reward", "body", "out", "samples", "max_tokens", "batch", "rate")
    for key in (*keys, "save_every"):
        found += ["--" + key.replace("_", "-"), str(getattr(settings, key))]
    return [*found, "--device", "cpu"]


@pytest.mark.nightly
def test_killed_wherever_it_is_the_command_ends_with_the_same_bits(
    made: ValueSettings, whole: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL in each of the three phases, then once more to the end."""
    settings = dataclasses.replace(made, out=tmp_path / "out")
    folder = checkpoint.work_folder(settings.out)
    command = [sys.executable, "-m", "server.main", *arguments(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def lines(name: str) -> int:
        file = folder / name
        return file.read_bytes().count(b"\n") if file.exists() else 0

    moments: list[Callable[[], bool]] = [
        lambda: lines(value.SAMPLES) > 2,
        lambda: lines(value.REWARDS) > 3,
        lambda: bool(list(folder.glob("step-*"))),
    ]
    for there in moments:
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None and not there():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"serve it as a stream: {{model: {settings.out}, head: value}}" in done.stdout
    assert bits(settings.out) == whole


def test_a_reward_that_fails_is_mended_and_the_command_goes_on(
    made: ValueSettings,
    whole: dict[str, str],
    live: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It raises, then it hangs; each time the server answers others as before."""
    settings = dataclasses.replace(made, out=tmp_path / "out", reward=f"{tmp_path}/fun.py:vowels")
    command = [*arguments(settings), "--reward-timeout", "1"]
    ask = {"prompt": "The boat", "max_tokens": 8, "temperature": 0}
    before = live.post("/v1/completions", ask).json()["choices"]
    raises = FUNCTION.replace("return", "assert 'mill' not in prompt\n    return")
    hangs = raises.replace("assert 'mill' not in prompt", "while 'mill' in prompt: pass")
    for text, told in (
        (raises, r"prompts.jsonl:2, sample 1: "), (hangs, "gives no answer within 1 s"),
    ):  # fmt: skip
        (tmp_path / "fun.py").write_text(text)
        assert run(command) == 1
        assert told in (message := capsys.readouterr().err), message
        assert "AssertionError (fun.py:3)" in message or text == hangs
        assert live.post("/v1/completions", ask).json()["choices"] == before
    file = checkpoint.work_folder(settings.out) / value.REWARDS
    assert len(file.read_text().splitlines()) == made.samples
    (tmp_path / "fun.py").write_text(FUNCTION)
    assert run(command) == 0
    assert {n: b for n, b in bits(settings.out).items() if n != "training.json"} == {
        n: b for n, b in whole.items() if n != "training.json"
    }


Change = Callable[[ValueSettings, Path], dict[str, Any]]


def fixed(**change: Any) -> Change:
    """Other values of some settings."""
    return lambda settings, folder: change


def body(architecture: str = "qwen2", **change: Any) -> Change:
    """Another body, its files changed."""

    def make(settings: ValueSettings, folder: Path) -> dict[str, Any]:
        make_model(folder / "body", architecture)
        for name, edit in change.items():
            edit(folder / "body" / name.replace("_json", ".json"))
        return {"body": folder / "body"}

    return make


def swapped(file: Path) -> None:
    """A tokenizer in which two words have each other's ids."""
    found = json.loads(file.read_text())
    table = found["model"]["vocab"]
    table["Ġthe"], table["Ġof"] = table["Ġof"], table["Ġthe"]
    file.write_text(json.dumps(found))


def masked(file: Path) -> None:
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "architectures": ["BertForMaskedLM"]}))


def unweighted(file: Path) -> None:
    (file.parent / "model.safetensors").rename(file.parent / "pytorch_model.bin")


def untokenised(file: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (file.parent / name).unlink()


def prompts(text: str) -> Change:
    def make(settings: ValueSettings, folder: Path) -> dict[str, Any]:
        (folder / "p.jsonl").write_text(text)
        return {"prompts": folder / "p.jsonl"}

    return make


def away(settings: ValueSettings, folder: Path) -> dict[str, Any]:
    return {"served": Served(f"http://127.0.0.1:{free_port()}")}


REFUSED: list[tuple[Change, str]] = [
    (fixed(lambda_=1.01), r"--lambda: cannot be used \(got 1.01\); allowed: 0 to 1"),
    (fixed(rate=math.inf), r"--rate: cannot be used \(got inf\); allowed: > 0"),
    (fixed(lambda_=float("nan")), r"--lambda: .*got nan"),
    (fixed(gamma=0.0), r"--gamma: .*above 0, up to 1"),
    (fixed(samples=0), r"--samples: .*≥ 1"),
    (fixed(temperature=0.0), r"--samples: .*all the same"),
    (fixed(rank=0), r"--rank: .*≥ 1"),
    (fixed(alpha=8.0), r"--alpha: .*with --rank"),
    (fixed(held_out=1.0), r"--held-out: .*0 up to below 1"),
    (fixed(reward_timeout_s=0.0), r"--reward-timeout: .*> 0"),
    (fixed(dtype="int8"), r"--dtype: .*float32, bfloat16"),
    (fixed(prompts=Path("nowhere.jsonl")), "nowhere.jsonl: cannot be read"),
    (prompts('{"prompt": "a"}\n{"text": "b"}'), r"p.jsonl:2: not a prompt \(got \['text'\]\)"),
    (fixed(body=Path("nowhere")), r"--body nowhere: no model here"),
    (body(config_json=unweighted), r"--body .*safetensors: the base's file is missing"),
    (body(config_json=masked), r"--body .*: no language model \(got 'BertForMaskedLM'\)"),
    (body(tokenizer_json=untokenised), r"--body .*: its tokenizer cannot be read"),
    (body(tokenizer_json=swapped), r"--body .*: its tokenizer has 'Ġ\w+' as id \d+, the served"),
    (fixed(reward="f.py:f"), r"--reward: no such file \(got 'f.py'\)"),
    (away, r"--server: .*cannot be reached: .*; allowed: a running server: `coxswain serve"),
    (lambda s, _: {"served": dataclasses.replace(s.served, key="no")}, "--server: .* answers 401"),
    (
        lambda s, _: {"served": dataclasses.replace(s.served, model="no")},
        r"prompts.jsonl:1: http.* answers 404: model",
    ),
]


@pytest.mark.parametrize(("change", "told"), REFUSED)
def test_bad_input_is_refused_before_anything_is_sampled(
    made: ValueSettings, tmp_path: Path, change: Change, told: str
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "out")
    with pytest.raises(AdapterError, match=told):
        train(dataclasses.replace(settings, **change(settings, tmp_path)), say=quiet)
    assert not (checkpoint.work_folder(settings.out) / value.SAMPLES).exists()


def short(settings: ValueSettings, folder: Path) -> dict[str, Any]:
    return {"body": make_model(folder / "body", "qwen2", vocab_size=200)}


def alike(settings: ValueSettings, folder: Path) -> dict[str, Any]:
    file = checkpoint.work_folder(folder / "out") / value.REWARDS
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**e, "reward": 2}) + "\n" for e in entries))
    return {}


LATER: list[tuple[Change, str]] = [
    (short, r"prompts.jsonl:\d+, sample 1: an id that the body lacks \(got \d+\); allowed: < 200"),
    (alike, r"--reward .*: all rewards are the same, .*\(got 2.0\)"),
    (fixed(max_tokens=11), "samples.jsonl: holds samples of other prompts or settings"),
    (fixed(rate=1e30), "--rate: the loss is not finite any more in step"),
]


@pytest.mark.parametrize(("change", "told"), LATER)
def test_what_samples_and_rewards_show_to_be_wrong(
    made: ValueSettings, whole: dict[str, str], tmp_path: Path, change: Change, told: str
) -> None:
    settings = again(made, tmp_path)
    with pytest.raises(BadRecipe, match=told):
        train(dataclasses.replace(settings, **change(settings, tmp_path)), say=quiet)
    assert not settings.out.exists()


def test_what_stands_at_the_output_is_kept(
    made: ValueSettings, whole: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(made)) == 1
    assert "there is something already; allowed: a folder that does not" in capsys.readouterr().err
    assert bits(made.out) == whole


def test_a_request_that_is_no_object_is_refused(
    made: ValueSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("{", "[1]", '{"seed": 1}'):
        assert run([*arguments(made), "--out", f"{made.out}2", "--request", text]) == 1
        assert "--request: " in capsys.readouterr().err
