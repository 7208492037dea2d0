"""What a version of vLLM offers of what we use.

    python -m load_tests.vllm_symbols WHEEL --out tests/steering/vllm_versions/VERSION.json

Reads the Python of a wheel, or of a folder that has the package `vllm`, and runs none of it. The
result has names and argument lists of the symbols in `load_tests.vllm_uses`, no source. The tests
compare the versions that we allow (`tests/steering/test_vllm_versions.py`).
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from load_tests.vllm_uses import Uses, find_uses
from steering.versions import DIFFERENCES

ROOT = Path(__file__).parents[1]

Entry = dict[str, Any]
"""A symbol: `kind`, and `args` of what can be called, `members` of a class or module.

`args`: 'x' is required, 'x=' is not, '/' ends those by position only, '*' begins those by name
only, '*x' and '**x' take the rest. A member that cannot be called is null.
"""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Package:
    """The sources of one version.

    Args:
        folder: has the folder `vllm`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tree = cache(self._read)

    def file(self, module: str) -> Path | None:
        """The file of a module; None if there is none."""
        path = self.folder / module.replace(".", "/")
        options = (path.with_suffix(".py"), path / "__init__.py")
        return next((p for p in options if p.is_file()), None)

    def _read(self, module: str) -> ast.Module | None:
        file = self.file(module)
        return None if file is None else ast.parse(file.read_text("utf-8"))

    def find(self, symbol: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """(module, node) where a symbol is defined, through re-exports; None: there is none.

        A module's node is its whole tree.
        """
        module, _, name = symbol.partition(":")
        ours = module.split(".")[0] == "vllm"  # a folder may have other packages too
        tree = self._tree(module) if ours else None
        if tree is None or depth > 8:
            return None
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, _Function | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    return module, node
        for other in self._elsewhere(module, nodes, name):
            if (found := self.find(other, depth + 1)) is not None:
                return found
        inner = self._tree(f"{module}.{name}")
        return None if inner is None else (f"{module}.{name}", inner)

    def _elsewhere(self, module: str, nodes: list[ast.AST], name: str) -> Iterator[str]:
        """Symbols that a module's name may stand for."""
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        yield f"{self._absolute(module, node)}:{alias.name}"
                    elif alias.name == "*":
                        yield f"{self._absolute(module, node)}:{name}"
            elif isinstance(node, ast.Dict):  # names that are imported when they are asked for
                for key, value in zip(node.keys, node.values, strict=True):
                    place = getattr(value, "value", None)
                    asked = isinstance(key, ast.Constant) and key.value == name
                    if asked and isinstance(place, str) and place.startswith("."):
                        yield module + (place if ":" in place else f"{place}:{name}")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        file = self.file(module)
        parts = module.split(".")
        up = node.level - (file is not None and file.name == "__init__.py")
        return ".".join(parts[: len(parts) - up] + ([node.module] if node.module else []))

    def bases(self, module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
        """The class and those of vLLM's that it derives from, nearest first."""
        found = [(module, node)]
        for base in node.bases:
            expr = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(expr, ast.Name) and expr.id != node.name:
                place = self.find(f"{module}:{expr.id}")
                if place is not None and isinstance(place[1], ast.ClassDef):
                    found += self.bases(place[0], place[1])
        return found

    def describe(self, symbol: str, members: set[str]) -> Entry | None:
        """What a symbol is; None if this version lacks it.

        Args:
            symbol: 'module:name'.
            members: of it, that are looked for.
        """
        place = self.find(symbol)
        if place is None:
            return None
        module, node = place
        if isinstance(node, _Function):
            return {"kind": "function", "args": arguments(node, bound=False)}
        if isinstance(node, ast.Module):
            found: Entry = {"kind": "module", "members": {}}
            for name in sorted(members):
                entry = self.describe(f"{module}:{name}", set())
                if entry is not None:
                    found["members"][name] = entry.get("args")
            return found
        if not isinstance(node, ast.ClassDef):
            return {"kind": "value"}
        return self._class(module, node, members)

    def _class(self, module: str, node: ast.ClassDef, members: set[str]) -> Entry:
        chain = self.bases(module, node)
        known: dict[str, list[str] | None] = {}
        for _, one in reversed(chain):
            known |= _members(one)
        init = known.get("__init__")
        if init is None:
            init = ["*", *(f for _, one in reversed(chain) for f in _fields(one))]
            if any(getattr(d, "id", getattr(getattr(d, "func", d), "id", "")) == "dataclass"
                   for _, one in chain for d in one.decorator_list):  # fmt: skip
                init = init[1:]
        kept = {name: known[name] for name in sorted(members) if name in known}
        return {"kind": "class", "args": init, "members": kept}


def arguments(node: _Function, *, bound: bool) -> list[str]:
    """The argument list of a function, as `Entry` has it.

    Args:
        node: the function.
        bound: whether its first argument is filled in already.
    """
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    first = len(positional) - len(args.defaults)
    found = [a.arg + "=" * (i >= first) for i, a in enumerate(positional)]
    if args.posonlyargs:
        found.insert(len(args.posonlyargs), "/")
    decorators = {getattr(d, "id", "") for d in node.decorator_list}
    if bound and "staticmethod" not in decorators:
        found = found[1:]
    if args.vararg or args.kwonlyargs:
        found.append(f"*{args.vararg.arg if args.vararg else ''}")
    found += [a.arg + "=" * (d is not None)
              for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]  # fmt: skip
    return [*found, f"**{args.kwarg.arg}"] if args.kwarg else found


def _members(node: ast.ClassDef) -> dict[str, list[str] | None]:
    """What a class has: methods with their arguments, and attributes; not its bases'."""
    found: dict[str, list[str] | None] = {}
    for part in ast.walk(node):
        match part:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.setdefault(name, None)
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found[part.target.id] = None
        elif isinstance(part, ast.Assign):
            found |= {t.id: None for t in part.targets if isinstance(t, ast.Name)}
        elif isinstance(part, _Function):
            decorators = {getattr(d, "id", getattr(d, "attr", "")) for d in part.decorator_list}
            attribute = decorators & {"property", "cached_property", "setter"}
            found[part.name] = None if attribute else arguments(part, bound=True)
    return found


def _fields(node: ast.ClassDef) -> list[str]:
    """The fields of a class that takes them as arguments."""
    return [
        part.target.id + "=" * (part.value is not None)
        for part in node.body
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and "ClassVar" not in ast.dump(part.annotation)
    ]


def snapshot(folder: Path, uses: Uses, version: str) -> dict[str, Any]:
    """What one version offers of what is used.

    Args:
        folder: has the folder `vllm`.
        uses: what is looked for.
        version: its name.
    """
    members: dict[str, set[str]] = {symbol: set() for symbol in uses.symbols}
    wanted = [*uses.members, *((c.symbol, c.member) for c in uses.calls if c.member)]
    wanted += [(o.symbol, o.member) for o in uses.overrides]
    for symbol, member in wanted:
        members.setdefault(symbol, set()).add(member)
    package = Package(folder)
    described = {s: package.describe(s, names) for s, names in sorted(members.items())}
    return {"version": version, "symbols": {s: e for s, e in described.items() if e is not None}}


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What changed between two snapshots: 'module:name' or 'module:name.member' → how.

    Args:
        old: the earlier one.
        new: the later one.
    """
    before, after = _flat(old), _flat(new)
    found = {}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name):
            continue
        if name not in after or name not in before:
            found[name] = "gone" if name not in after else "new"
            continue
        a, b = before[name], after[name]
        if not isinstance(a, list) or not isinstance(b, list):
            found[name] = f"{a or 'an attribute'} became {b or 'an attribute'}"
            continue
        parts = [f"+ `{x}`" for x in b if x not in a] + [f"− `{x}`" for x in a if x not in b]
        found[name] = ", ".join(parts) or "the order of arguments"
    return found


def _flat(found: dict[str, Any]) -> dict[str, list[str] | str | None]:
    """Symbols and their members, each with its arguments."""
    flat: dict[str, list[str] | str | None] = {}
    for symbol, entry in found["symbols"].items():
        flat[symbol] = entry.get("args", entry["kind"])
        flat |= {f"{symbol}.{m}": args for m, args in entry.get("members", {}).items()}
    return flat


def versions_page(offered: list[dict[str, Any]], reasons: dict[str, str]) -> str:
    """The table of docs/reference/vllm-versions.md.

    Args:
        offered: snapshots, the earliest first.
        reasons: `steering.versions.DIFFERENCES`.
    """
    first, last = offered[0], offered[-1]
    changed = differences(first, last)
    versions = f"{last['version']} against {first['version']}"
    lines = [f"| symbol | {versions} | why the streams stay right |", "|---|---|---|"]
    for name, how in changed.items():
        module, _, symbol = name.partition(":")
        lines.append(f"| `{symbol}` of `{module}` | {how} | {reasons.get(name, '')} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=Path, help="a wheel, a folder with the package vllm, or one with snapshots"
    )
    parser.add_argument("--version", help="of a folder; a wheel's is in its name")
    parser.add_argument("--out", type=Path, help="where the snapshot goes; else: the page's table")
    asked = parser.parse_args(argv)
    if asked.out is None:
        files = sorted(asked.source.glob("*.json"))
        print(versions_page([json.loads(f.read_text("utf-8")) for f in files], dict(DIFFERENCES)))
        return
    with tempfile.TemporaryDirectory() as unpacked:
        folder, version = asked.source, asked.version
        if folder.suffix == ".whl":
            version = folder.name.split("-")[1]
            with zipfile.ZipFile(folder) as wheel:
                wheel.extractall(unpacked, [n for n in wheel.namelist() if n.endswith(".py")])
            folder = Path(unpacked)
        if version is None:
            parser.error("--version: a folder does not tell it")
        found = snapshot(folder, find_uses(ROOT), version)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    print(f"{asked.out}: {len(found['symbols'])} symbols of vLLM {version}")


if __name__ == "__main__":
    main(sys.argv[1:])
