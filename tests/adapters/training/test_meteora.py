"""Whole runs on a tiny model: they learn, resume to the same bits, and refuse before they start."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterError
from adapters.formats.base import base_shapes
from adapters.formats.inspect import inspect
from adapters.training import checkpoint
from adapters.training.errors import BadRecipe
from adapters.training.meteora import train as meteora
from adapters.training.meteora.settings import Settings
from adapters.training.meteora.train import train
from server.main import run
from tests.adapters.make import ATTENTION, make_lora
from tests.models import make_model

ASKED = {"row": "Who rows the boat?", "sum": "How much is 7 and 5?"}
"""Task → what every one of its examples asks."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A base, two adapters of different ranks and modules, and data; four steps."""
    folder = tmp_path_factory.mktemp("made")
    torch.set_num_threads(1)
    base = make_model(folder / "base", "llama")
    make_lora(folder / "row", base, seed=1, r=2)
    make_lora(folder / "sum", base, seed=2, r=5, targets=ATTENTION)
    for task, asked in ASKED.items():
        lines = [
            {"messages": [{"role": "user", "content": asked},
                          {"role": "assistant", "content": f"The {task} is {i}."}]}
            for i in range(6)
        ]  # fmt: skip
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Settings(
        base,
        {task: folder / task for task in ASKED},
        {task: folder / f"{task}.jsonl" for task in ASKED},
        folder / "pack",
        steps=4,
        batch=4,
        turns=2,
        rate=1e-2,
        adapters_rate=1e-3,
        save_every=1,
    )


def quiet(line: str) -> None:
    """Says nothing."""


def bits(folder: Path) -> dict[str, str]:
    """Hash of every file of a pack."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(made: Settings) -> dict[str, str]:
    """The files of an uninterrupted run."""
    train(made, say=quiet)
    return bits(made.out)


def test_the_pack_passes_the_servers_checks(made: Settings, whole: dict[str, str]) -> None:
    pack = inspect(made.out, base_shapes(made.base), max_rank=9)
    assert pack.members == ("row", "sum") and pack.ranks == (2, 5)
    assert len(pack.gates) == 2 * 7 and pack.top_k == 2
    assert not checkpoint.work_folder(made.out).exists()
    assert {Path(name).suffix for name in whole} == {".json", ".safetensors"}


def test_gates_learn_and_adapters_stay_unless_asked(made: Settings, tmp_path: Path) -> None:
    told: list[str] = []
    settings = dataclasses.replace(
        made, out=tmp_path / "pack", adapters_rate=None, steps=60, gate_std=0.02, save_every=60
    )
    train(settings, say=told.append)
    right = float(told[-1].rsplit("%", 1)[0].rsplit(" ", 1)[1])
    # Layer 0 sees single tokens; those that both tasks' texts share cannot be told apart there.
    assert right > 85
    for task, folder in made.adapters.items():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (settings.out / task / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("last", [1, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(
    made: Settings,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last: int,
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "pack")
    save = checkpoint.save

    def dying(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    told: list[str] = []
    train(settings, say=told.append)
    assert told[0] == f"resumed after step {last} of 4"
    assert bits(settings.out) == whole


def arguments(settings: Settings) -> list[str]:
    """The run as a command line."""
    found = ["train", "meteora", "--base", str(settings.base), "--out", str(settings.out)]
    for task in settings.adapters:
        found += ["--adapter", f"{task}={settings.adapters[task]}"]
        found += ["--data", f"{task}={settings.data[task]}"]
    for key in ("steps", "batch", "turns", "rate", "adapters_rate", "save_every"):
        found += ["--" + key.replace("_", "-"), str(getattr(settings, key))]
    return [*found, "--device", "cpu"]


@pytest.mark.slow
def test_killed_wherever_it_is_the_command_ends_with_the_same_bits(
    made: Settings, whole: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL ever later after the first file appears, then once more to the end."""
    settings = dataclasses.replace(made, out=tmp_path / "pack")
    folder = checkpoint.work_folder(settings.out)
    command = [sys.executable, "-m", "server.main", *arguments(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for wait_s in (0.0, 0.05):
        shown = sorted(folder.glob("*"))
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and sorted(folder.glob("*")) in (shown, []):
            time.sleep(0.002)
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapters.max_rank ≥ 9" in done.stdout
    assert bits(settings.out) == whole
    assert not folder.exists()


def test_a_half_written_checkpoint_is_not_read(
    made: Settings, whole: dict[str, str], tmp_path: Path
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "pack")
    part = checkpoint.work_folder(settings.out) / "checkpoint.part"
    part.mkdir(parents=True)
    (part / "state.safetensors").write_bytes(b"\x08")
    train(settings, say=quiet)
    assert bits(settings.out) == whole


def test_killed_after_the_last_rename_the_command_still_succeeds(
    made: Settings, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "pack")

    def dying(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(meteora, "_remove", dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    train(settings, say=quiet)
    assert bits(settings.out) == whole
    assert not checkpoint.work_folder(settings.out).exists()


def test_an_unfinished_run_is_not_mixed_with_another(
    made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "pack")
    save = checkpoint.save

    def dying(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    with pytest.raises(BadRecipe, match=r"--rate: differs .*got 0.02.*allowed: 0.01, or remove"):
        train(dataclasses.replace(settings, rate=0.02), say=quiet)
    swapped = dict(reversed(settings.adapters.items()))
    with pytest.raises(BadRecipe, match="--adapter: in another order"):
        train(dataclasses.replace(settings, adapters=swapped), say=quiet)
    data = {**settings.data, "row": settings.data["sum"]}
    with pytest.raises(BadRecipe, match="data: differs from the unfinished run"):
        train(dataclasses.replace(settings, data=data), say=quiet)
    with (
        checkpoint.locked(checkpoint.work_folder(settings.out)),
        pytest.raises(BadRecipe, match="another process is training there"),
    ):
        train(settings, say=quiet)


Change = Callable[[Settings, Path], dict[str, Any]]


def broken_lora(settings: Settings, folder: Path) -> dict[str, Any]:
    """An adapter whose tensors have another rank than its config says."""
    make_lora(folder / "row", settings.base, seed=1, r=2)
    path = folder / "row" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name] = torch.zeros(3, tensors[name].shape[1])
    save_file(tensors, path)
    return {"adapters": {**settings.adapters, "row": folder / "row"}}


def other_base(settings: Settings, folder: Path) -> dict[str, Any]:
    """A base that the adapters were not made for."""
    return {"base": make_model(folder / "other", "qwen2")}


def no_template(settings: Settings, folder: Path) -> dict[str, Any]:
    """A base without a chat template."""
    base = make_model(folder / "base", "llama")
    (base / "chat_template.jinja").unlink()
    return {"base": base}


def plain_data(settings: Settings, folder: Path) -> dict[str, Any]:
    """Prompts with completions, though turns are asked for."""
    (folder / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    return {"data": {**settings.data, "row": folder / "x.jsonl"}}


def system_again(settings: Settings, folder: Path) -> dict[str, Any]:
    """A template that takes a system message only at the start, and data that begin with one."""
    base = make_model(folder / "base", "llama")
    template = (
        "{% for m in messages %}{% if m.role == 'system' and loop.index > 1 %}"
        "{{ raise_exception('one system message only') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    (base / "chat_template.jinja").write_text(template)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Yes."},
    ]
    (folder / "x.jsonl").write_text(json.dumps({"messages": messages}))
    return {"base": base, "data": {**settings.data, "row": folder / "x.jsonl"}}


def fixed(**change: Any) -> Change:
    """Other values of some settings."""
    return lambda settings, folder: change


REFUSED: Sequence[tuple[Change, str]] = [
    (fixed(top_k=3), r"--top-k: cannot be used \(got 3\); allowed: 1 to 2"),
    (fixed(rate=float("nan")), r"--rate: .*got nan.*> 0"),
    (fixed(rate=0.0), r"--rate: .*> 0"),
    (fixed(adapters_rate=-1.0), r"--adapters-rate: .*got -1.0.*> 0"),
    (fixed(steps=0), r"--steps: .*≥ 1"),
    (fixed(warm_up=2.0), r"--warm-up: .*0 to 1"),
    (fixed(max_tokens=3), r"row.jsonl:1: too long .*≤ 3"),
    (fixed(max_tokens=513), r"--max-tokens: more than the base's positions .*≤ 512"),
    (system_again, r"x.jsonl:1: the chat template fails: one system message only"),
    (fixed(dtype="int8"), r"--dtype: .*float32, bfloat16"),
    (lambda s, _: {"data": {"row": s.data["row"]}}, r"--data: .*one file for each of row, sum"),
    (lambda s, _: {"adapters": {"row": s.adapters["row"]}}, r"--adapter: .*two or more"),
    (lambda s, _: {"adapters": {**s.adapters, "../x": s.base}}, r"--adapter: .*'../x'.*letters"),
    (
        lambda s, _: {"adapters": {**s.adapters, "row": s.base}},
        r"--adapter row: base: no adapter here",
    ),
    (
        broken_lora,
        r"--adapter row: .* does not have the config's rank \(got \(3, \d+\)\); allowed: rank 2",
    ),
    (other_base, r"--adapter row: .* its shape does not fit the base \(got .*\); allowed: "),
    (no_template, r"the base has no chat template; allowed: --chat-template"),
    (plain_data, r"x.jsonl:1: .*cannot be joined.*--turns 1"),
]


@pytest.mark.parametrize(("change", "told"), REFUSED)
def test_bad_input_is_refused_before_training(
    made: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    told: str,
) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(meteora, "_model", never)
    settings = dataclasses.replace(made, out=tmp_path / "pack")
    with pytest.raises(AdapterError, match=told):
        train(dataclasses.replace(settings, **change(settings, tmp_path)), say=quiet)
    assert not settings.out.exists()


def test_a_run_that_diverges_ends_without_a_pack(made: Settings, tmp_path: Path) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "pack", adapters_rate=1e30)
    with pytest.raises(BadRecipe, match="not finite any more in step"):
        train(settings, say=quiet)
    assert not settings.out.exists()


def test_what_stands_at_the_output_is_kept(
    made: Settings, whole: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(made)) == 1
    assert "there is something already; allowed: a folder that does not exist" in (
        capsys.readouterr().err
    )
    assert bits(made.out) == whole


def test_the_command_names_what_is_given_twice(
    made: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    again = f"row={made.adapters['row']}"
    assert run([*arguments(made), "--adapter", again]) == 1
    assert "--adapter row: given twice" in capsys.readouterr().err
