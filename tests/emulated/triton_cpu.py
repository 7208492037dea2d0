"""Triton's interpreter as vLLM's Triton backend for CPUs.

vLLM's CPU build runs its Model Runner V2 where Triton has a backend named `cpu` (see
`vllm/triton_utils/importing.py`). `install` registers one whose kernels run in Triton's
interpreter: Python and NumPy, one program of the grid after the other.

It cannot prove that a kernel compiles, that programs which run at once do not disturb each other,
or how a GPU rounds (the interpreter cuts bfloat16 off).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests import fast_interpreter


def install() -> None:
    """Makes this process interpret Triton's kernels and vLLM run its V2 runner.

    Raises:
        RuntimeError: Triton or vLLM was imported before, so that it is too late.
    """
    early = [name for name in ("triton", "vllm") if name in sys.modules]
    if early:
        raise RuntimeError(f"{', '.join(early)}: imported before the emulation was installed")
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    _register_backend()
    _patch_interpreter()
    fast_interpreter.install()


def _register_backend() -> None:
    from triton.backends import backends
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        """Always there; torch's inductor asks it for a target when it hashes kernels."""

        @staticmethod
        def is_active() -> bool:
            return True

        @staticmethod
        def get_current_target() -> GPUTarget:
            return GPUTarget("cpu", 0, 0)

        @staticmethod
        def get_current_device() -> int:
            return 0

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError(ty)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Callable[..., Any]:
            raise NotImplementedError

    class Registered:
        driver = Driver
        compiler = BaseBackend

    backends.setdefault("cpu", Registered)


class _Index(int):
    """A loop index. Compiled kernels may cast theirs; a plain int cannot be cast."""

    def to(self, *_: Any, **__: Any) -> _Index:
        return self


def _patch_interpreter() -> None:
    """Three differences between interpreted and compiled kernels that vLLM's kernels meet."""
    from triton.runtime import interpreter

    patch_core = interpreter._patch_lang_core

    def with_indices(lang: Any, scope: Any) -> None:
        patch_core(lang, scope)
        plain = lang.range

        def indices(*args: Any, **options: Any) -> Iterator[_Index]:
            return map(_Index, plain(*args, **options))

        scope.set_attr(lang, "range", indices)

    interpreter._patch_lang_core = with_indices

    # `~` and `==` on a flag give integers in the interpreter; a masked store takes flags only.
    store = interpreter.InterpreterBuilder.create_masked_store

    def with_flags(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return store(self, pointers, value, mask, *rest)

    interpreter.InterpreterBuilder.create_masked_store = with_flags
    # Checks for overflow, which compiled kernels leave out too unless they are debugged.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
