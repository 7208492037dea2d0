"""Compiles Triton kernels for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def compiled(
    kernel: Any, types: dict[str, Any], constants: dict[str, Any], arch: int, warps: int
) -> Any:
    """The kernel, as machine code.

    Args:
        kernel: jitted.
        types: of its first arguments, as Triton writes them; tuples for tuples.
        constants: the others.
        arch: compute capability, 80 for 8.0.
        warps: of a program.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert [*types, *constants] == kernel.arg_names
    # What a layer's sizes and addresses are: multiples of 16.
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, kind in enumerate(types.values()):
        aligned |= {path: [["tt.divisibility", 16]] for path in _paths(kind, (i,))}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def _paths(kind: Any, path: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where the numbers and pointers of an argument lie in it, tuples within tuples."""
    if not isinstance(kind, tuple):
        return [path]
    return [found for i, part in enumerate(kind) for found in _paths(part, (*path, i))]
