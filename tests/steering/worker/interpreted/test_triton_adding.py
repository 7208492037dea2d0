"""The worker's Triton path against its torch path, through the operation that layers call."""

from __future__ import annotations

import importlib.util
import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adapters.kernels import operation, triton_operation
from steering.worker.adapting import triton as module
from steering.worker.adapting.groups import Adapted
from tests.steering.worker.test_adapting import CPU, SETS, SLOTS, STREAMS, random_uses

ROOM, INTO, SIZES = 24, 20, (9, 6)
ROWS = {i: max(s.layout(o).rows for o in s.owners) for i, s in SETS.items()}


@pytest.fixture(scope="module", autouse=True)
def _triton_for_these_tensors() -> None:
    triton_operation.register("CPU")


def summed(y: torch.Tensor, x: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    found = y.clone()
    torch.ops.coxswain.adapter_sum(found, x, a, b, list(SIZES))
    return found


def by_torch(y: torch.Tensor, x: torch.Tensor, a: Any, b: Any, groups: Any) -> torch.Tensor:
    found = y.clone()
    with operation.adding(operation.added(groups, len(x), x.dtype)):
        torch.ops.coxswain.adapter_groups(found, x, a, b, list(SIZES))
    return found


def test_steps_of_random_requests_are_as_in_torch() -> None:
    rng, gen = random.Random(3), torch.Generator().manual_seed(3)
    layouts = {i: {o: s.layout(o) for o in s.owners} for i, s in SETS.items()}
    adding = module.TritonAdding([*STREAMS], CPU, tokens=32, lines=6, slots=len(SETS), ranks=ROOM)
    normal = partial(torch.randn, generator=gen)
    # Zero beyond a set's own, as vLLM leaves it: the torch path's bundles need it.
    a = [torch.zeros(len(SETS), 1, ROOM, INTO) for _ in SIZES]
    b = [torch.zeros(len(SETS), 1, size, ROOM) for size in SIZES]
    for set_id, slot in SLOTS.items():
        for side, other in zip(a, b, strict=True):
            side[slot, 0, : ROWS[set_id]] = normal((ROWS[set_id], INTO))
            other[slot, 0, :, : ROWS[set_id]] = normal((other.shape[2], ROWS[set_id]))
    counted = changed = 0
    for _ in range(14):
        count = rng.randint(1, 6)
        sets = np.array([rng.choice([0, *SETS]) for _ in range(count)], np.int64)
        uses = [random_uses(rng, SETS[int(s)]) if s else () for s in sets]
        requests = np.repeat(np.arange(count), [rng.randint(0, 4) for _ in range(count)])
        total = requests.size + rng.choice([0, 0, 3])
        counting = rng.random() < 0.5
        for _ in range(2):  # the second step finds its tables written, unless it counts
            for stream in STREAMS.items():
                mine = Adapted(uses, sets, SLOTS, layouts, counting)
                theirs = Adapted(uses, sets, SLOTS, layouts, counting)
                y, x = normal((total, sum(SIZES))), normal((total, INTO))
                with adding.adapting(mine, module.Pass(*stream, requests, total)):
                    got = summed(y, x, a, b)
                want = by_torch(y, x, a, b, theirs.groups(*stream, requests, total, CPU))
                assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
                assert torch.equal(summed(y, x, a, b), y)
                changed += int(not torch.equal(got, y))
                counted += compare_routes(mine, theirs, uses, stream[0])
    assert changed > 20 and counted > 3


def compare_routes(mine: Adapted, theirs: Adapted, uses: Any, stream: str) -> int:
    """Requests whose routes were counted, and counted alike."""
    got: dict[str, torch.Tensor] = {}
    want: dict[str, torch.Tensor] = {}
    for found, adapted in ((got, mine), (want, theirs)):
        for routed in adapted.routed:  # one per set that holds the pack
            found[routed.digest] = found.get(routed.digest, 0) + routed.counts
    compared = 0
    for q, own in enumerate(uses):
        for use in own:
            if use.stream == stream and use.top_k and use.weight and use.digest in want:
                assert torch.equal(got[use.digest][q], want[use.digest][q])
                compared += int(want[use.digest][q].any())
    return compared


def test_chosen_by_the_platform(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    runner = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8, max_num_seqs=2),
        lora_config=SimpleNamespace(max_loras=2, max_lora_rank=8),
        device=CPU,
    )
    assert module.triton_adding(runner, ["base"]) is None
    keys = []
    monkeypatch.setattr(triton_operation, "register", lambda: keys.append("CUDA"))
    monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    assert isinstance(module.triton_adding(runner, ["base"]), module.TritonAdding)
    assert keys == ["CUDA"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert module.triton_adding(runner, ["base"]) is None
    assert "Triton is not installed" in caplog.text


def test_every_kernel_is_launched_before_serving() -> None:
    """Once for each kind of layer and each way that it is compiled; layers of a kind are alike."""

    def layer(into: int, sizes: tuple[int, ...], split: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            lora_a_stacked=tuple(torch.zeros(2, 1, 8, into) for _ in sizes),
            lora_b_stacked=tuple(torch.zeros(2, 1, size, 8) for size in sizes),
            output_slices=sizes,
            punica_wrapper=SimpleNamespace(split=split),
        )

    adding = module.TritonAdding(["base"], CPU, tokens=200, lines=4, slots=2, ranks=8)
    layers = [layer(4, (3, 2)), layer(4, (3, 2)), layer(5, (3, 2)), layer(4, (5,))]
    embedding = SimpleNamespace(lora_a_stacked=torch.zeros(2, 8, 9), lora_b_stacked=None)
    # Of 1, 129 and 1025 tokens two fit into a step.
    assert adding.warm_up([*layers, embedding]) == 3 * 2
    summed: list[int] = []

    def reduced(scores: torch.Tensor) -> torch.Tensor:
        summed.append(scores.shape[1])
        return scores

    operation.split_over_ranks(reduced)
    assert adding.warm_up([layer(4, (5,), split=True)]) == 2
    # The sum over ranks is warmed up, too.
    assert summed == [1, 129]
