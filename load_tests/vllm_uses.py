"""What of vLLM our sources use: names that they import, and what they call, read and override.

Found by reading the sources, so nothing is imported or run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("adapters", "steering", "server")

_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"

OBJECTS = {
    "runner": _V1,
    "input_batch": "vllm.v1.worker.gpu_input_batch:InputBatch",
    "sampling_metadata": "vllm.v1.sample.metadata:SamplingMetadata",
    "vllm_config": "vllm.config:VllmConfig",
    "model_config": "vllm.config:ModelConfig",
    "compilation_config": "vllm.config:CompilationConfig",
    "parallel_config": "vllm.config:ParallelConfig",
    "cache_config": "vllm.config:CacheConfig",
    "scheduler_config": "vllm.config:SchedulerConfig",
    "speculative_config": "vllm.config:SpeculativeConfig",
    "lora_config": "vllm.config:LoRAConfig",
    "kv_cache_config": "vllm.v1.kv_cache_interface:KVCacheConfig",
    "sampling_params": "vllm.sampling_params:SamplingParams",
    "lora_request": "vllm.lora.request:LoRARequest",
}
"""What our sources call vLLM's objects, and their classes. One underscore before is allowed."""

OBJECTS_OF_V2 = OBJECTS | {
    "runner": _V2,
    "input_batch": "vllm.v1.worker.gpu.input_batch:InputBatch",
    "req_states": "vllm.v1.worker.gpu.states:RequestState",
    "block_tables": "vllm.v1.worker.gpu.block_table:BlockTables",
}
"""The same in what belongs to Model Runner V2: `steering/worker/v2*.py`."""

INSTANCES = {
    "vllm.platforms:current_platform": "vllm.platforms.interface:Platform",
    "vllm:ModelRegistry": "vllm.model_executor.models.registry:_ModelRegistry",
}
"""Objects that are imported, and their classes."""

_COMMON = {*dir(object), "__dict__", *dir(dict)} - {"__init__"}
"""What every object or mapping has."""


_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Call:
    """One call of something of vLLM's.

    Args:
        where: file:line.
        symbol: what is called: 'module:name'.
        member: its method that is called, '' for itself.
        count: positional arguments, −1 where some are unpacked.
        keywords: names of the others; '**' where some are unpacked.
    """

    where: str
    symbol: str
    member: str
    count: int
    keywords: tuple[str, ...]


@dataclass(frozen=True, order=True)
class Override:
    """A method of ours in the place of one of vLLM's.

    Args:
        where: file:line.
        symbol: the class of vLLM's.
        member: the method.
        needs: names of the arguments that it cannot do without.
        most: positional arguments that it takes, −1 for any number.
        open: whether it takes keywords that it does not name.
        names: all that it names.
    """

    where: str
    symbol: str
    member: str
    needs: tuple[str, ...]
    most: int
    open: bool
    names: tuple[str, ...]


@dataclass
class Uses:
    """Everything that was found.

    Attributes:
        symbols: 'module:name' → the first file that imports it.
        members: (symbol, attribute) → file:line of the first use.
        calls: of imported names and their methods.
        overrides: by classes of ours.
    """

    symbols: dict[str, str] = field(default_factory=dict)
    members: dict[tuple[str, str], str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)


def find_uses(root: Path) -> Uses:
    """Reads all of our packages below `root`."""
    found = Uses()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            tree = ast.parse(file.read_text("utf-8"))
            _File(str(file.relative_to(root)), tree, found).read()
    return found


class _File:
    """One file of ours.

    Args:
        name: its path below the root.
        tree: its source.
        found: takes what is found.
    """

    def __init__(self, name: str, tree: ast.Module, found: Uses) -> None:
        self.name, self.tree, self.found = name, tree, found
        self.names: dict[str, str] = {}
        self.objects = OBJECTS_OF_V2 if Path(name).stem.startswith("v2") else OBJECTS

    def read(self) -> None:
        """Notes everything."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    self._imports(f"{node.module}:{alias.name}", alias.asname or alias.name)
        if not self.names:
            return
        for node in ast.walk(self.tree):
            where = f"{self.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and (symbol := self._object(node.value)):
                self._member(symbol, node.attr, where)
            elif isinstance(node, ast.Call):
                self._call(node, where)
            elif isinstance(node, ast.ClassDef):
                self._class(node)

    def _imports(self, symbol: str, name: str) -> None:
        self.names[name] = symbol
        self.found.symbols.setdefault(symbol, self.name)

    def _member(self, symbol: str, name: str, where: str) -> None:
        if name not in _COMMON:
            self.found.members.setdefault((symbol, name), where)

    def _object(self, node: ast.expr) -> str | None:
        """The symbol, or the class of the object, that an expression is; None if it is ours."""
        if isinstance(node, ast.Name) and node.id in self.names:
            return INSTANCES.get(self.names[node.id], self.names[node.id])
        name = str(getattr(node, "id", getattr(node, "attr", "")))
        return self.objects.get(name.removeprefix("_"))

    def _call(self, node: ast.Call, where: str) -> None:
        target, member = node.func, ""
        if isinstance(target, ast.Attribute):
            member, target = target.attr, target.value
        symbol = self._object(target)
        imported = isinstance(target, ast.Name) and target.id in self.names
        if symbol is None or member in _COMMON or not (member or imported):
            return
        unpacked = any(isinstance(a, ast.Starred) for a in node.args)
        count = -1 if unpacked else len(node.args)
        keywords = tuple(k.arg or "**" for k in node.keywords)
        self.found.calls.append(Call(where, symbol, member, count, keywords))

    def _class(self, node: ast.ClassDef) -> None:
        bases = [self.names[b.id] for b in node.bases if isinstance(b, ast.Name)
                 and b.id in self.names]  # fmt: skip
        own = set(_own_names(node))
        for symbol in bases:
            for part in ast.walk(node):
                where = f"{self.name}:{getattr(part, 'lineno', 0)}"
                if not isinstance(part, ast.Attribute) or not _is_self(part.value):
                    continue
                if part.attr not in own or _is_super(part.value):
                    self._member(symbol, part.attr, where)
            for method in node.body:
                if isinstance(method, _Function) and not method.name.startswith("__"):
                    self.found.overrides.append(_override(self.name, symbol, method))


def _own_names(node: ast.ClassDef) -> Iterator[str]:
    """What a class defines, in its body or through `self`."""
    for part in ast.walk(node):
        if isinstance(part, _Function):
            yield part.name
        elif isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield str(getattr(part, "id", getattr(part, "attr", "")))


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"


def _is_self(node: ast.expr) -> bool:
    return _is_super(node) or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def _override(file: str, symbol: str, method: ast.FunctionDef | ast.AsyncFunctionDef) -> Override:
    args = method.args
    positional = [a.arg for a in (*args.posonlyargs, *args.args)]
    static = any(getattr(d, "id", "") == "staticmethod" for d in method.decorator_list)
    positional = positional if static else positional[1:]
    required = positional[: len(positional) - len(args.defaults)] if args.defaults else positional
    keyword = [a.arg for a in args.kwonlyargs]
    needed = [a for a, d in zip(keyword, args.kw_defaults, strict=True) if d is None]
    return Override(
        f"{file}:{method.lineno}",
        symbol,
        method.name,
        (*required, *needed),
        -1 if args.vararg else len(positional),
        args.kwarg is not None,
        (*positional, *keyword),
    )
