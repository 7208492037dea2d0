"""Runs of `coxswain train critic` that are cut off, and go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.training import checkpoint
from adapters.training.critic import train as critic
from adapters.training.critic.settings import CriticSettings
from adapters.training.critic.train import train
from adapters.training.errors import BadRecipe
from tests.adapters.training.critic_runs import RULE, arguments, bits, lines, quiet, tagged

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["probe", "rank"])
@pytest.mark.parametrize("last", [2, 10, 15])
def test_a_resumed_run_ends_with_the_same_bits(
    made: CriticSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, last: int
) -> None:
    make = tagged if kind == "rank" else lambda s, out, **_: dataclasses.replace(s, out=out)
    settings = make(made, tmp_path / "one", rank=2)
    train(settings, say=quiet)
    again = make(made, tmp_path / "two", rank=2)
    save = checkpoint.save

    def dying(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(again, say=quiet)
    monkeypatch.undo()
    told: list[str] = []
    train(again, say=told.append)
    assert told[1] == f"resumed after step {last} of 15"
    assert bits(again.out) == bits(settings.out)
    left = {path.name for path in checkpoint.work_folder(again.out).iterdir()}
    assert left == ({"lock", "labels.jsonl"} if kind == "probe" else {"lock"})


def filled(path: Path) -> bool:
    """Whether something lies there; what is renamed meanwhile does not."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size > 0
    return False


@pytest.mark.nightly
def test_killed_wherever_it_is_the_command_ends_with_the_same_bits(
    made: CriticSettings, tmp_path: Path
) -> None:
    """SIGKILL whenever something new lies in the work folder, then once more to the end."""
    waits = RULE.replace("    return", "    time.sleep(0.02)\n    return")
    (tmp_path / "slow.py").write_text("import time\n" + waits)
    label = f"{tmp_path / 'slow.py'}:numbers"
    settings = dataclasses.replace(made, out=tmp_path / "critic", label=label)
    train(dataclasses.replace(settings, out=tmp_path / "whole"), say=quiet)
    folder = checkpoint.work_folder(settings.out)
    command = [sys.executable, "-m", "server.main", *arguments(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stages = set()
    for awaited in ("labels.jsonl", "states-*", "step-*02", "step-*10"):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not any(map(filled, folder.glob(awaited))):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            stages.add(awaited)
    assert {"labels.jsonl", "states-*"} <= stages
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bits(settings.out) == bits(tmp_path / "whole")
    assert {path.name for path in folder.iterdir()} == {"lock", "labels.jsonl"}
    assert "held-out tokens" in done.stdout and "threshold  precision" in done.stdout
    assert f"{{on: STREAM, head: classifier, path: {settings.out}}}" in done.stdout


def test_killed_after_the_last_rename_the_command_still_reports(
    made: CriticSettings, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(made, out=tmp_path / "critic")

    def dying(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(critic, "_clean", dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    assert train(settings, say=quiet)["held_out"]["tokens"] > 0
    assert bits(settings.out) == whole
    left = {path.name for path in checkpoint.work_folder(settings.out).iterdir()}
    assert left == {"lock", "labels.jsonl"}


def test_other_settings_need_no_new_labels(made: CriticSettings, tmp_path: Path) -> None:
    """The work folder of a complete run, copied, and a rule that counts its calls."""
    rule = tmp_path / "rule.py"
    calls = tmp_path / "calls"
    rule.write_text(
        RULE.replace("    return", f"    open({str(calls)!r}, 'a').write('x')\n    return")
    )
    first = dataclasses.replace(made, out=tmp_path / "one", label=f"{rule}:numbers")
    train(first, say=quiet)
    assert calls.stat().st_size == 160
    second = dataclasses.replace(first, out=tmp_path / "two", rate=0.02)
    work = checkpoint.work_folder(second.out)
    shutil.copytree(checkpoint.work_folder(first.out), work)
    train(second, say=quiet)
    assert calls.stat().st_size == 160
    assert bits(first.out) != bits(second.out)


def test_an_unfinished_run_is_not_mixed_with_another(
    made: CriticSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(RULE)
    settings = dataclasses.replace(made, out=tmp_path / "critic", label=f"{rule}:numbers")
    save = checkpoint.save

    def dying(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(settings, say=quiet)
    monkeypatch.undo()
    with pytest.raises(BadRecipe, match=r"--rate: differs .*got 0.02.*allowed: 0.01, or remove"):
        train(dataclasses.replace(settings, rate=0.02), say=quiet)
    with pytest.raises(BadRecipe, match="adapter: differs from the unfinished run"):
        train(dataclasses.replace(settings, adapter=None), say=quiet)
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, lines(40))))
    with pytest.raises(BadRecipe, match="replies and labels: differs from the unfinished run"):
        train(dataclasses.replace(settings, data=other), say=quiet)
    rule.write_text(RULE.replace("[0-9]+", "[0-4]"))
    with pytest.raises(BadRecipe, match=r"replies and labels: differs .*step-\*"):
        train(settings, say=quiet)
    with (
        checkpoint.locked(checkpoint.work_folder(settings.out)),
        pytest.raises(BadRecipe, match="another process is training there"),
    ):
        train(settings, say=quiet)
