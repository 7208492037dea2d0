"""A load that fails, wherever it does, leaves nothing; and whoever tries again gets it all.

One slot, that another set had before: what remains of it would be somebody else's adapter.
"""

from __future__ import annotations

import errno
import gc
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

from adapters.errors import BadAdapter, DoesNotFit, FilesLost, NoRoom, ServerFault, from_wire
from adapters.sets import AdapterSet
from steering.engine_args import adapter_engine_args
from tests.adapters.make import ATTENTION, make_lora
from tests.engine.driver import Case, Engine, Use
from tests.engine.test_exactness import assert_exact, prompt
from tests.injected import POINTS, Injected, Point, failing, filled, manager_of, runner_of
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A base with one slot, and two adapters that change different layers."""
    folder = tmp_path_factory.mktemp("models")
    found = Engine(folder, ("llama", VOCAB_SIZE), {}, **adapter_engine_args(1, 16))
    base = found.folders["base"]
    found.load_adapters(
        {
            "theirs": make_lora(folder / "theirs", base, seed=1, r=8),
            "mine": make_lora(folder / "mine", base, seed=2, targets=ATTENTION),
        }
    )
    yield found
    del found
    gc.collect()


def request(engine: Engine, name: str) -> LoRARequest:
    """As the engine gets it with a request that uses one adapter."""
    _, found = engine.adapted(Case([1], adapters=(Use(name),)))
    assert found is not None
    return LoRARequest(**found.lora_request())


def answers(engine: Engine, name: str, seed: int) -> None:
    """A request gets what PEFT computes with this adapter."""
    case = Case(prompt(random.Random(seed), 20, 40), max_tokens=4, adapters=(Use(name),))
    assert_exact(engine, [case], engine.run([case]))


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("point", POINTS)
def test_who_tries_again_does_not_get_somebody_elses_adapter(
    one_slot: Engine, point: Point, after: int
) -> None:
    engine, manager = one_slot.llm.llm_engine, manager_of(one_slot.llm)
    theirs, mine = request(one_slot, "theirs"), request(one_slot, "mine")
    assert engine.add_lora(theirs)
    answers(one_slot, "theirs", 1)
    assert engine.remove_lora(theirs.lora_int_id)
    with failing(manager, point, after, Injected("here")), pytest.raises(Injected):
        engine.add_lora(mine)
    # Posted again: it says that it is loaded, and a request runs on it.
    assert engine.add_lora(mine)
    answers(one_slot, "mine", 2)
    assert engine.remove_lora(mine.lora_int_id)


def rpc(engine: Engine, name: str, *args: Any) -> dict[str, Any]:
    """What the worker answers to the front end."""
    found: dict[str, Any] = engine.llm.collective_rpc(f"coxswain_{name}", args=args)[0]
    return found


def path(engine: Engine, name: str) -> str:
    """Of an adapter's set."""
    return request(engine, name).lora_path


def nothing_is_left(engine: Engine, manager: Any) -> None:
    """Neither id nor weights, in any book."""
    assert not engine.llm.llm_engine.list_loras()
    assert not manager.list_adapters() and not manager.layouts and not manager.slots
    assert not manager._ahead
    assert not manager._adapter_manager._active_adapters
    assert filled(manager) == []


ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory"), NoRoom, "no memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), NoRoom, "no memory"),
    (MemoryError(), NoRoom, "no memory"),
    (OSError(errno.ENOMEM, "cannot allocate"), NoRoom, "no memory"),
    (OSError(errno.EIO, "input/output error"), FilesLost, "cannot read the files"),
    (Injected("a bug"), ServerFault, "Injected: a bug"),
    (BadAdapter("broken", field="here"), BadAdapter, "here: broken"),
    (DoesNotFit("of another base"), DoesNotFit, "of another base"),
]


@pytest.mark.parametrize("point", POINTS)
def test_the_front_end_hears_whose_fault_it_is_and_nothing_is_left(
    one_slot: Engine, point: Point
) -> None:
    manager, mine = manager_of(one_slot.llm), path(one_slot, "mine")
    for error, kind, text in ERRORS:
        assert rpc(one_slot, "load", path(one_slot, "theirs")) == {"done": None}
        assert rpc(one_slot, "unload", path(one_slot, "theirs")) == {"done": None}
        with failing(manager, point, 5, error):
            told = rpc(one_slot, "load", mine)
        found = from_wire(told["error"])
        assert type(found) is kind and text in str(found)
        nothing_is_left(one_slot, manager)
    assert rpc(one_slot, "load", mine) == {"done": None}
    answers(one_slot, "mine", 3)
    assert rpc(one_slot, "unload", mine) == {"done": None}
    nothing_is_left(one_slot, manager)


def test_a_set_that_broke_off_while_it_was_read_ahead_is_read_again(one_slot: Engine) -> None:
    manager, mine = manager_of(one_slot.llm), path(one_slot, "mine")
    with failing(manager, "read", 2, OSError(errno.EIO, "input/output error")):
        told = {"done": False}
        while not told.get("done", True):
            told = rpc(one_slot, "read_ahead", mine, 0.0)
    assert told["error"]["kind"] == "FilesLost"  # type: ignore[index]
    nothing_is_left(one_slot, manager)
    assert rpc(one_slot, "read_ahead", mine, 0.0) == {"done": False}
    assert rpc(one_slot, "unload", mine) == {"done": None}  # whoever asked for it gave up
    nothing_is_left(one_slot, manager)
    assert rpc(one_slot, "load", mine) == {"done": None}
    answers(one_slot, "mine", 4)
    rpc(one_slot, "unload", mine)


def test_a_failed_load_leaves_the_set_that_is_there(one_slot: Engine) -> None:
    """The server never asks for more sets than there are slots; this is what would happen."""
    manager = manager_of(one_slot.llm)
    assert rpc(one_slot, "load", path(one_slot, "theirs")) == {"done": None}
    with failing(manager, "read", 3, Injected("here")):
        assert "error" in rpc(one_slot, "load", path(one_slot, "mine"))
    answers(one_slot, "theirs", 5)
    assert rpc(one_slot, "unload", path(one_slot, "theirs")) == {"done": None}
    nothing_is_left(one_slot, manager)


def test_a_request_never_runs_on_a_slot_that_its_set_is_not_in(one_slot: Engine) -> None:
    plan, found = one_slot.adapted(Case([1], adapters=(Use("mine"),)))
    assert plan is not None and found is not None
    runner = runner_of(one_slot.llm)
    adapters = runner.get_model()._step.adapters
    rpc(one_slot, "load", path(one_slot, "theirs"))
    theirs = request(one_slot, "theirs").lora_int_id
    try:
        for there in (0, found.set_id):
            with pytest.raises(RuntimeError, match="in no slot"):
                adapters.adapted([plan.adapters], np.array([there]), False)
        with pytest.raises(RuntimeError, match="lacks adapters of its request"):
            adapters.adapted([plan.adapters], np.array([theirs]), False)
    finally:
        rpc(one_slot, "unload", path(one_slot, "theirs"))


def test_two_sets_of_one_id_are_never_taken_for_each_other(
    one_slot: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server never asks for both at a time; this is what would happen."""
    monkeypatch.setattr("adapters.sets.IDS", range(1 << 20, (1 << 20) + 1))
    manager, mine, theirs = (
        manager_of(one_slot.llm),
        path(one_slot, "mine"),
        request(one_slot, "theirs"),
    )
    assert rpc(one_slot, "load", theirs.lora_path) == {"done": None}
    for call in (("read_ahead", mine, 0.0), ("load", mine)):
        answer = rpc(one_slot, *call)
        assert "another set of adapters is loaded under its id" in answer["error"]["text"]
    assert rpc(one_slot, "unload", mine) == {"done": None}
    with pytest.raises(DoesNotFit, match=f"once set {theirs.lora_name} is unloaded"):
        manager._apply_adapters({request(one_slot, "mine")})
    answers(one_slot, "theirs", 6)
    assert rpc(one_slot, "unload", theirs.lora_path) == {"done": None}
    with pytest.raises(DoesNotFit, match="another set"):  # none is loaded, and one step wants both
        manager._apply_adapters({request(one_slot, "mine"), theirs})
    for one in (mine, theirs.lora_path):
        rpc(one_slot, "unload", one)
    nothing_is_left(one_slot, manager)


def test_a_step_loads_no_files_that_are_not_what_the_set_says(
    one_slot: Engine, tmp_path: Path
) -> None:
    """Where no front end has loaded a set, vLLM does, inside the step."""
    manager, right = manager_of(one_slot.llm), request(one_slot, "mine")
    manager._apply_adapters({right})
    assert manager.list_adapters() == {right.lora_int_id}
    rpc(one_slot, "unload", right.lora_path)
    changed = shutil.copytree(one_slot.adapters["mine"].folder, tmp_path / "changed")
    tensors = load_file(changed / "adapter_model.safetensors")
    save_file({k: 2 * v for k, v in tensors.items()}, changed / "adapter_model.safetensors")
    found = AdapterSet.from_path(right.lora_path)
    moved = AdapterSet.of([msgspec.structs.replace(found.members[0], folder=str(changed))])
    with pytest.raises(FilesLost, match="changed since"):
        manager._apply_adapters({LoRARequest(**moved.lora_request())})
    nothing_is_left(one_slot, manager)
