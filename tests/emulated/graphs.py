"""CUDA graphs on a CPU: torch operations and interpreted Triton launches, recorded and replayed.

A graph freezes what a CUDA graph freezes: no Python runs at a replay, numbers that were passed to
kernels keep their values, the grid keeps its size, tensors keep their memory. What a capture does
not permit raises (`tests.emulated.capture`), nested captures too.

Memory. What a capture allocates belongs to the graph's pool, and CUDA gives it to others once
nobody holds it. So before each replay all such memory is filled with NaN (integers: a number out
of any range); a graph that reads what an earlier replay left there gives wrong answers here too.
A replay whose inputs nobody but graphs holds any more raises: CUDA would read freed memory. Graphs
that are replayed one behind the other as they were captured may read what those before them left:
the pool gave it to nobody in between. Weak references (`weak_ref`) hold nothing.

It cannot prove: that graphs which share a pool do not overwrite each other's held outputs; that
host and device tensors are kept apart (here all are on the host, so a capture may read a host
tensor that was made before it as if it were the device's, and a host read of a host tensor raises
though CUDA would permit it); the order of streams.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter

from tests.emulated.capture import Capture, CaptureError

aten = torch.ops.aten

ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Operations that launch nothing: a replay skips them."""


class StaleMemory(RuntimeError):
    """A replay would read memory that was freed after the capture."""


@dataclass(frozen=True)
class _Operation:
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any

    def replay(self) -> None:
        """Runs again, on and into the memory of the capture."""
        new = self.func(*self.args, **self.kwargs)
        for old, fresh in zip(tree_leaves(self.out), tree_leaves(new), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                old.copy_(fresh)


@dataclass(frozen=True)
class _Launch:
    executor: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def replay(self) -> None:
        """Launches the kernel again."""
        _launch(self.executor, *self.args, **self.kwargs)


_launch: Callable[..., Any] = interpreter.GridExecutor.__call__


class CUDAGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    active: ClassVar[CUDAGraph | None] = None
    _suspended: ClassVar[Capture | None] = None
    """Of a capture that was ended inside an operation, which the next one goes on with."""
    _captured: ClassVar[int] = 0
    _run: ClassVar[list[CUDAGraph]] = []
    """Graphs that were replayed last, in the order in which they were captured."""
    _all: ClassVar[weakref.WeakSet[CUDAGraph]] = weakref.WeakSet()

    def __init__(self, *_: Any, **__: Any) -> None:
        self.reset()
        CUDAGraph._all.add(self)

    def reset(self) -> None:
        """Forgets the capture."""
        self._steps: list[_Operation | _Launch] = []
        # By storage: one recorded tensor in it, and how many there are.
        self._storages: dict[int, torch.Tensor] = {}
        self._recorded: Counter[int] = Counter()
        self._own: set[int] = set()
        self._constants: set[int] = set()
        self._capture: Capture | None = None
        self._number = 0
        self.replays = 0

    # --- capture --------------------------------------------------------------------------------

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """Starts to record.

        Raises:
            CaptureError: another graph is being captured.
        """
        if CUDAGraph.active is not None:
            raise CaptureError("another capture")
        CUDAGraph._captured += 1
        CUDAGraph.active, self._number = self, CUDAGraph._captured
        suspended, CUDAGraph._suspended = CUDAGraph._suspended, None
        if suspended is None:
            self._capture = Capture(self)
            self._capture.begin()
        else:
            self._capture = suspended
            suspended.recording, suspended.paused = self, False

    def capture_end(self) -> None:
        """Ends what `capture_begin` began."""
        capture = self._capture
        assert capture is not None
        CUDAGraph.active = self._capture = None
        if capture.depth:
            CUDAGraph._suspended, capture.paused = capture, True
        else:
            capture.end()

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Takes one torch operation; storages that first appear in `out` are the graph's own."""
        args, kwargs = self._note((args, kwargs), own=False)
        out = self._note(out, own=True)
        if func not in ALLOCATIONS:
            self._steps.append(_Operation(func, args, kwargs, out))

    def launch(self, executor: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Runs a kernel and records it, with the grid that it has now."""
        assert self._capture is not None
        grid = executor.grid

        def frozen(arguments: Any) -> Any:
            executor.grid = grid(arguments)
            return executor.grid

        if callable(grid):
            executor.grid = frozen
        with self._capture.pause():
            _launch(executor, *args, **kwargs)
            args, kwargs = self._note((args, kwargs), own=False)
        self._steps.append(_Launch(executor, args, kwargs))

    def constant(self, tensor: torch.Tensor) -> None:
        """Takes a scalar that was made from a Python number; it keeps its value."""
        self._note(tensor, own=False)
        self._constants.add(tensor.untyped_storage()._cdata)

    def _note(self, tree: Any, *, own: bool) -> Any:
        """Puts aliases in the place of tensors: other holders of their memory can be counted."""

        def alias(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            # A view would keep the tensor that it is a view of alive.
            with torch._C.DisableTorchFunctionSubclass():
                found = torch.empty(0, dtype=leaf.dtype).set_(
                    leaf.untyped_storage(), leaf.storage_offset(), leaf.size(), leaf.stride()
                )
            key = found.untyped_storage()._cdata
            if key not in self._storages:
                self._storages[key] = found
                if own:
                    self._own.add(key)
            self._recorded[key] += 1
            return found

        return tree_map(alias, tree)

    # --- replay ---------------------------------------------------------------------------------

    def replay(self) -> None:
        """Runs the recorded operations.

        Raises:
            CaptureError: a capture is in progress.
            StaleMemory: an input was freed.
        """
        self._replay()

    @torch.inference_mode()
    def _replay(self) -> None:
        """The same; what tests patch, since others may hold `replay` itself."""
        if CUDAGraph.active is not None:
            raise CaptureError("a replay")
        if not CUDAGraph._run or CUDAGraph._run[-1]._number + 1 != self._number:
            CUDAGraph._run.clear()
        self._check_inputs(set().union(*(graph._own for graph in CUDAGraph._run)))
        CUDAGraph._run.append(self)
        for key in self._own - self._constants:
            if not self._held(key):
                _poison(self._storages[key])
        for step in self._steps:
            step.replay()
        self.replays += 1

    def _check_inputs(self, left: set[int]) -> None:
        """Whether all inputs are there; `left` is of graphs before this one."""
        for key, tensor in self._storages.items():
            if key in self._own | self._constants | left or self._held(key):
                continue
            if size := tensor.untyped_storage().nbytes():
                raise StaleMemory(
                    f"an input of the graph ({size} bytes, {tensor.dtype}) was freed after the "
                    "capture: nobody else holds its memory"
                )

    def _held(self, key: int) -> bool:
        """Whether anybody but graphs holds a storage."""
        # torch keeps one for Python, once a storage was asked for.
        ours = 1 + sum(graph._recorded[key] for graph in CUDAGraph._all)
        return torch._C._storage_Use_Count(key) > ours


def _poison(tensor: torch.Tensor) -> None:
    """Fills a tensor's whole memory with what no later operation can take for a value."""
    dtype = tensor.dtype
    memory = torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())
    if dtype == torch.bool:
        memory.fill_(True)
    elif dtype.is_floating_point or dtype.is_complex:
        memory.fill_(float("nan"))
    else:
        memory.fill_(torch.iinfo(dtype).max // 2)


def weak_ref(tensor: Any) -> Any:
    """In place of vLLM's `weak_ref_tensor`: the same memory, which the result does not hold."""
    graph = CUDAGraph.active
    if not isinstance(tensor, torch.Tensor) or graph is None:
        return tensor
    assert graph._capture is not None
    with graph._capture.pause():
        return graph._note(tensor, own=False)


@contextmanager
def graph(cuda_graph: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    """In place of `torch.cuda.graph`; pools and streams mean nothing here."""
    cuda_graph.capture_begin()
    try:
        yield
    except BaseException:
        cuda_graph.capture_end()
        cuda_graph.reset()
        raise
    cuda_graph.capture_end()


@contextmanager
def emulated() -> Iterator[None]:
    """Puts the emulation in the place of torch's graphs."""
    synchronize = torch.accelerator.synchronize

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        if CUDAGraph.active is None:
            _launch(executor, *args, **kwargs)
        else:
            CUDAGraph.active.launch(executor, args, kwargs)

    def wait(*args: Any, **kwargs: Any) -> None:
        if CUDAGraph.active is not None:
            raise CaptureError("synchronize")
        synchronize(*args, **kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (interpreter.GridExecutor, "__call__", launch),
            (torch.cuda, "CUDAGraph", CUDAGraph),
            (torch.cuda, "graph", graph),
            (torch.cuda, "is_current_stream_capturing", lambda: CUDAGraph.active is not None),
            (torch.accelerator, "synchronize", wait),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield
