"""Emulated graphs: what is frozen, what a capture does not permit, which memory a replay reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.emulated.capture import CaptureError
from tests.emulated.graphs import CUDAGraph, StaleMemory, emulated, graph, weak_ref


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    with emulated():
        yield
    assert CUDAGraph.active is None


@triton.jit
def scale(x: Any, y: Any, factor: Any, n: Any, SIZE: tl.constexpr) -> None:
    """Multiplies n values of x."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


def test_a_replay_reads_new_inputs_at_the_old_addresses() -> None:
    x, out = torch.arange(4.0), torch.zeros(4)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = x * 2 + 1
        out.copy_(y)
    x.copy_(torch.full((4,), 5.0))
    captured.replay()
    assert out.tolist() == [11.0] * 4
    assert y.tolist() == [11.0] * 4


def test_python_does_not_run_again() -> None:
    x, runs = torch.ones(2), []
    captured = CUDAGraph()
    with graph(captured):
        runs.append("once")
        x.add_(len(runs))
    for _ in range(3):
        captured.replay()
    assert runs == ["once"]
    assert x.tolist() == [5.0, 5.0]  # 1, one at the capture, three replays of +1


def test_a_launch_keeps_its_scalars_and_its_grid() -> None:
    x, y, setting = torch.arange(6.0), torch.zeros(6), {"factor": 3.0, "programs": 1}
    captured = CUDAGraph()
    with graph(captured):
        scale[lambda _: (setting["programs"],)](x, y, setting["factor"], 6, SIZE=4)
    assert y.tolist() == [0, 3, 6, 9, 0, 0]
    setting.update(factor=7.0, programs=2)
    x.add_(1)
    captured.replay()
    assert y.tolist() == [3, 6, 9, 12, 0, 0]
    scale[lambda _: (setting["programs"],)](x, y, setting["factor"], 6, SIZE=4)
    assert y.tolist() == [7, 14, 21, 28, 35, 42]


def test_an_operation_in_python_is_recorded_as_what_it_launches() -> None:
    runs = []

    @torch.library.custom_op("coxswain_emulated::add_runs", mutates_args={"x"})
    def add_runs(x: torch.Tensor) -> None:
        runs.append(1)
        x.add_(len(runs))

    x, captured = torch.zeros(1), CUDAGraph()
    with graph(captured):
        add_runs(x)
    captured.replay()
    captured.replay()
    assert x.tolist() == [3.0]
    assert len(runs) == 1


FORBIDDEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "flags": lambda x: x[x > 0],
    "put by flags": lambda x: x.index_put_((x > 0,), x[:3]),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "from a list": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "from numpy": lambda x: x + torch.from_numpy(np.ones(4, np.float32)),
    "wait": lambda x: torch.accelerator.synchronize(),
    "nested": lambda x: CUDAGraph().capture_begin(),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_capture_does_not_permit(name: str) -> None:
    x = torch.arange(4.0)
    with pytest.raises(CaptureError, match="not permitted"), graph(CUDAGraph()):
        FORBIDDEN[name](x)
    assert CUDAGraph.active is None
    x.add_(1)  # nothing is recorded any more
    assert x.tolist() == [1.0, 2.0, 3.0, 4.0]


PERMITTED: dict[str, Callable[[torch.Tensor], Any]] = {
    "where with values": lambda x: torch.where(x > 0, x, 0.0),
    "fill by flags": lambda x: x.masked_fill_(x > 2, 1.0),
    "a scalar": lambda x: x * torch.tensor(2.0),
    "gather": lambda x: x[torch.zeros_like(x, dtype=torch.long)],
    "repeat with a size": lambda x: x.repeat_interleave(
        torch.ones_like(x, dtype=torch.long), output_size=4
    ),
}


@pytest.mark.parametrize("name", PERMITTED)
def test_a_capture_permits(name: str) -> None:
    x, captured = torch.arange(4.0), CUDAGraph()
    with graph(captured):
        found = PERMITTED[name](x)
    x.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    want = PERMITTED[name](x.clone())
    captured.replay()
    assert torch.equal(found, want)


def test_a_replay_does_not_see_what_an_earlier_one_left() -> None:
    """Memory of the pool is somebody else's between replays."""
    x, out, captured = torch.ones(3), torch.zeros(3), CUDAGraph()
    with graph(captured):
        total = torch.empty(3)
        total.add_(x)  # reads what it never wrote
        out.copy_(total)
        del total
    captured.replay()
    assert out.isnan().all()


def test_memory_that_is_held_keeps_its_values() -> None:
    x, captured = torch.ones(3), CUDAGraph()
    with graph(captured):
        total = torch.empty(3)
        total.add_(x)
    total.zero_()
    captured.replay()
    captured.replay()
    assert total.tolist() == [2.0] * 3


def test_an_input_that_was_freed_is_found() -> None:
    out = torch.zeros(3)

    def captured_on_a_fresh_tensor() -> tuple[CUDAGraph, Any]:
        fresh, captured = torch.ones(3), CUDAGraph()
        with graph(captured):
            out.add_(fresh)
        captured.replay()
        return captured, fresh

    captured, fresh = captured_on_a_fresh_tensor()
    captured.replay()
    assert out.tolist() == [3.0] * 3
    del fresh
    with pytest.raises(StaleMemory, match="12 bytes"):
        captured.replay()
    assert out.tolist() == [3.0] * 3


def test_the_output_of_one_graph_is_freed_memory_to_another_unless_held() -> None:
    x, out, first, second = torch.ones(2), torch.zeros(2), CUDAGraph(), CUDAGraph()
    with graph(first):
        between = x + 1
    with graph(second):
        out.copy_(between)
    x.add_(1)
    first.replay()
    second.replay()
    assert out.tolist() == [3.0, 3.0]
    del between
    with pytest.raises(StaleMemory):
        second.replay()


def pieces() -> tuple[CUDAGraph, CUDAGraph, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two graphs, the second of which reads what the first leaves; its inputs and outputs."""
    x, out, first, second = torch.ones(2), torch.zeros(2), CUDAGraph(), CUDAGraph()
    first.capture_begin()
    between = x + 1
    weak = weak_ref(between)
    first.capture_end()
    second.capture_begin()
    out.copy_(between * 2)
    second.capture_end()
    return first, second, x, weak, out


def test_graphs_in_the_order_of_their_captures_read_what_is_left() -> None:
    """As of vLLM's pieces: nobody holds what passes between them."""
    first, second, x, weak, out = pieces()
    x.add_(1)
    first.replay()
    assert weak.tolist() == [3.0, 3.0]
    weak.add_(1)  # what is launched between pieces
    second.replay()
    assert out.tolist() == [8.0, 8.0]
    with pytest.raises(StaleMemory):
        second.replay()
    first.replay()
    CUDAGraph().replay()  # another's memory
    with pytest.raises(StaleMemory):
        second.replay()


def test_a_weak_reference_holds_nothing() -> None:
    """What is launched at another time than between its pieces finds no values."""
    x, captured = torch.ones(2), CUDAGraph()
    with graph(captured):
        weak = weak_ref(torch.empty(2))
        x.add_(1)
    captured.replay()
    assert weak.isnan().all()


def test_a_capture_is_broken_inside_an_operation() -> None:
    x, graphs = torch.ones(2), [CUDAGraph(), CUDAGraph()]

    @torch.library.custom_op("coxswain_emulated::breaks", mutates_args={"y"})
    def breaks(y: torch.Tensor) -> None:
        y.mul_(2)
        graphs[0].capture_end()
        graphs[1].capture_begin()
        y.mul_(5)

    graphs[0].capture_begin()
    x.add_(1)
    breaks(x)
    x.add_(1)
    graphs[1].capture_end()
    assert x.tolist() == [21.0, 21.0]
    x.fill_(0)
    graphs[0].replay()
    assert x.tolist() == [2.0, 2.0]
    graphs[1].replay()
    assert x.tolist() == [11.0, 11.0]
    x.add_(1)  # nothing is recorded any more
    graphs[1].replay()
    assert x.tolist() == [61.0, 61.0]


def test_a_failed_capture_leaves_nothing() -> None:
    captured, x = CUDAGraph(), torch.zeros(2)
    with pytest.raises(CaptureError), graph(captured):
        x.add_(1).tolist()
    captured.replay()
    assert x.tolist() == [1.0, 1.0]


def test_no_replay_during_a_capture() -> None:
    captured, x = CUDAGraph(), torch.zeros(2)
    with graph(captured):
        x.add_(1)
    with pytest.raises(CaptureError), graph(CUDAGraph()):
        captured.replay()
