"""Checkpoints of a training run: safetensors and JSON, each whole or not there.

A run's work lies beside its result, in `<out>.training/`:

    lock              held while a process works here; the system lets go when the process ends
    step-00000100/    state.safetensors (what is trained and AdamW's moments), state.json
    pack/             the result while it is written; renamed to <out> when it is complete

A checkpoint is written under another name, flushed to the disk and renamed, so a kill at any moment
leaves the one before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.training.checked import flag
from adapters.training.errors import BadRecipe

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def work_folder(out: Path) -> Path:
    """Where a run whose result goes to `out` keeps its work."""
    return out.with_name(out.name + ".training")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a work folder, which is made if it is missing.

    Raises:
        BadRecipe: another process is training there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadRecipe("another process is training there", field=str(folder)) from error
        yield


def save(
    folder: Path,
    step: int,
    run: dict[str, Any],
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes the checkpoint after `step` steps and removes the one before.

    Args:
        folder: the work folder.
        step: steps that are done.
        run: what identifies the run, JSON values.
        parameters: what is trained, by name.
        optimizer: AdamW over them.
    """
    tensors = {name: value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        state = optimizer.state[value]
        tensors |= {f"{name}#{moment}": state[moment] for moment in _MOMENTS}
    part = folder / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, part / "state.safetensors")
    (part / "state.json").write_text(json.dumps({"step": step, "run": run}, indent=1) + "\n")
    before = _steps(folder)
    publish(part, folder / f"step-{step:08d}")
    for old in before:
        shutil.rmtree(old)


def publish(part: Path, final: Path) -> None:
    """Flushes a folder of files to the disk and gives it its final name."""
    for path in [*(p for p in part.rglob("*")), part]:
        _flush(path)
    part.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def last_run(folder: Path) -> dict[str, Any] | None:
    """What identifies the run that left the newest checkpoint; None where there is none."""
    if not _steps(folder):
        return None
    run: dict[str, Any] = _state(folder)["run"]
    return run


def check_free(out: Path, before: dict[str, Any] | None) -> None:
    """Keeps what stands at `out`, unless an unfinished run left it there.

    Args:
        out: where the result goes.
        before: from `last_run`.

    Raises:
        BadRecipe: something else is there.
    """
    if out.exists() and before is None:
        raise BadRecipe(
            "there is something already",
            field=f"--out {out}",
            allowed="a folder that does not exist yet",
        )


def check_same(before: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    """Compares what identifies a run with that of the run that left the newest checkpoint.

    Args:
        before: from `last_run`; its `settings` are by flag, without the dashes.
        run: of the same form.
        folder: the work folder.

    Raises:
        BadRecipe: something differs.
    """
    for key, value in run["settings"].items():
        if (old := before["settings"].get(key)) != value:
            raise BadRecipe(
                "differs from the unfinished run",
                field=flag(key),
                value=value,
                allowed=f"{old}, or remove {folder} to start again",
            )
    for key in run:
        if before.get(key) != run[key]:
            raise BadRecipe(
                "differs from the unfinished run",
                field=key,
                allowed=f"the same as before, or remove {folder} to start again",
            )


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((_steps(folder)[-1] / "state.json").read_bytes())
    return state


def restore(folder: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Puts the newest checkpoint into parameters and optimizer.

    Returns:
        Steps that are done; 0 where there is no checkpoint, and nothing is changed.
    """
    if not _steps(folder):
        return 0
    tensors = load_file(_steps(folder)[-1] / "state.safetensors")
    for name, value in parameters.items():
        value.data.copy_(tensors[name])
        moments = {moment: tensors[f"{name}#{moment}"] for moment in _MOMENTS}
        # AdamW counts its steps on the host, the moments lie where the parameter lies.
        optimizer.state[value] = {
            "step": moments["step"],
            "exp_avg": moments["exp_avg"].to(value.device),
            "exp_avg_sq": moments["exp_avg_sq"].to(value.device),
        }
    step: int = _state(folder)["step"]
    return step
