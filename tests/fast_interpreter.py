"""A pytest plugin: Triton's interpreter without work that it does per launch and need not do here.

Only for processes that interpret all kernels (`tests.interpreted`) on CPU tensors.
"""

from __future__ import annotations

from typing import Any


def pytest_configure() -> None:
    """Pytest calls this once, before it imports any test."""
    install()


def install() -> None:
    """Changes the interpreter of this process."""
    from triton.runtime import interpreter

    # It copies every argument's whole storage to the host and back. Here all arguments are on the
    # host: each KV cache would be copied onto itself.
    def as_they_are(_: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    interpreter.GridExecutor._init_args_hst = as_they_are
    interpreter.GridExecutor._restore_args_dev = lambda *_: None

    # It replaces Triton's language by its own, per launch and per call of a device function, and
    # puts it back. Nothing is compiled in this process, so once is enough.
    patch_language = interpreter._patch_lang
    replaced: set[int] = set()

    def once(fn: Any) -> Any:
        languages = {
            id(value)
            for value in fn.__globals__.values()
            if value is interpreter.tl or value is interpreter.tl.core
        }
        if not languages <= replaced:
            patch_language(fn)
            replaced.update(languages)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once
