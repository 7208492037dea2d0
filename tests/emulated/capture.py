"""What happens during the capture of an emulated CUDA graph: every operation is seen and recorded,
and what CUDA does not permit raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_DATA_DEPENDENT = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
"""Operations that wait for the device: they give the host a value, or a shape made of values."""

_HOST_READS = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.cpu: "cpu",
    torch.Tensor.item: "item",
    torch.Tensor.__array__: "__array__",
}
"""Methods that copy a device's tensor to the host. On a CPU's some never reach the dispatcher."""

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class CaptureError(RuntimeError):
    """An operation that CUDA does not permit while a stream is capturing."""

    def __init__(self, what: object) -> None:
        super().__init__(f"operation not permitted when stream is capturing: {what}")


class Recording(Protocol):
    """Where a capture puts what it sees."""

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Takes one torch operation that has run."""

    def constant(self, tensor: torch.Tensor) -> None:
        """Takes a scalar that was made from a Python number."""


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Operations(TorchDispatchMode):
    """Records the operations that reach torch's dispatcher."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._capture.paused:
            return func(*args, **kwargs)
        self._capture.check(func, args, kwargs)
        if _in_python(func):
            # A graph would hold what the operation launches, not its Python.
            with self, self._capture.inside():
                return func.redispatch(_CPU, *args, **kwargs)
        out = func(*args, **kwargs)
        self._capture.recording.record(func, args, kwargs, out)
        return out


class _Methods(TorchFunctionMode):
    """Sees the methods of tensors, also those that never reach the dispatcher."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = _HOST_READS.get(func)
        if name is not None and not self._capture.paused:
            raise CaptureError(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


class Capture:
    """One capture in progress.

    Args:
        recording: takes the operations.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.paused = False
        self.depth = 0
        """Of operations in Python that are running."""
        self._host: dict[int, torch.UntypedStorage] = {}
        self._modes = (_Operations(self), _Methods(self))

    def begin(self) -> None:
        """Starts to watch this thread's operations."""
        self._from_numpy = torch.from_numpy
        torch.from_numpy = self._noted_from_numpy  # type: ignore[assignment]
        for mode in self._modes:
            mode.__enter__()

    def end(self) -> None:
        """Stops watching."""
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
        torch.from_numpy = self._from_numpy

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While an operation in Python runs: until it has returned, the modes must stay."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Lets operations pass unseen."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def _noted_from_numpy(self, array: Any) -> torch.Tensor:
        """Host memory that is not pinned: the capture must not use it."""
        tensor = self._from_numpy(array)
        storage = tensor.untyped_storage()
        self._host[storage._cdata] = storage
        return tensor

    def check(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises if CUDA would not permit an operation.

        Raises:
            CaptureError: says which.
        """
        if func in _DATA_DEPENDENT or _indexes_by_flags(func, args):
            raise CaptureError(func)
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            raise CaptureError(f"{func} without output_size")
        used = tensors((args, kwargs))
        if self._host and any(t.untyped_storage()._cdata in self._host for t in used):
            raise CaptureError(f"{func} on host memory that is not pinned")
        if func is aten.lift_fresh.default:
            if args[0].dim():
                raise CaptureError("a tensor from a list: a copy of host memory that is not pinned")
            self.recording.constant(args[0])


def _indexes_by_flags(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an index counts flags: a bool index is a `nonzero`."""
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        flags = any(t is not None and t.dtype == torch.bool for t in args[1])
        # One value under a mask is a `masked_fill`, which counts nothing.
        return flags and (func is aten.index.Tensor or args[2].numel() > 1)
    return False


def _in_python(func: Callable[..., Any]) -> bool:
    """Whether an operator's kernel for CPUs is a Python function."""
    space, _, name = func._schema.name.partition("::")  # type: ignore[attr-defined]
    if overload := func._schema.overload_name:  # type: ignore[attr-defined]
        name = f"{name}.{overload}"
    kernels = torch.library._impls
    return any(f"{space}/{name}/{key}" in kernels for key in ("CPU", "CompositeExplicitAutograd"))
