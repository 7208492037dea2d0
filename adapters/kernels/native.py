"""The adapter sum row by row, in C++ (`native.cpp`), on CPUs that have a compiler.

It is for groups of few tokens, whose cost in torch is the starting of operations, and for routed
artefacts, of which it reads only the members that a token is routed to. Large plain groups stay
with `adapters.kernels.gated`: there matrix products are faster.

Letters: n rows, R columns of a row's set, M members of a routed artefact.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adapters.kernels.gated import Group, Route

Array = npt.NDArray[Any]

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""By what torch itself uses on this machine; a build is kept under a name that tells it."""

DTYPES = (torch.bfloat16, torch.float32)

NARROW, SMALL = 16, 1 << 10
"""A plain group goes row by row if its set has at most so many columns, or if its tokens times
columns are at most so many: about where matrix products, and what torch does around them, are as
fast (AVX-512, bfloat16, ranks from 8 to 224, 4 to 2048 tokens)."""


@cache
def build() -> bool:
    """Compiles and loads the kernel, once per machine and version; False if that cannot be done.

    Takes some twenty seconds the first time. `adapters.kernels.operation` must be there already.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        torch.ops.load_library(_compiled(Path(cache_home).expanduser() / "coxswain"))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logging.getLogger(__name__).warning("adapters run without the C++ kernel: %s", said)
        return False
    return True


def _compiled(folder: Path) -> Path:
    """The compiled kernel in a folder, made if it is missing; whole at any time."""
    capability = torch.backends.cpu.get_cpu_capability()
    content = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    target = folder / f"adapters-{capability.lower()}-{content}.so"
    if not target.is_file():
        from torch.utils.cpp_extension import include_paths

        libraries = Path(torch.__file__).parent / "lib"
        include = [f"-isystem{path}" for path in include_paths()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / target.name
            command = ["g++", "-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi"]
            command += [*_FLAGS.get(capability, ()), *include, str(_SOURCE), "-o", str(made)]
            command += [f"-L{libraries}", "-lc10", "-ltorch_cpu"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            made.replace(target)
    return target


@dataclass(frozen=True)
class Rows:
    """Groups as `native.cpp` reads them; see its Row and Route.

    Args:
        rows: [n, 8] int64.
        routes: [routes, 7] int64.
        spans: [spans, 3] int64, the columns of the routes' members.
        gates: float32, the rows' constant gates, one after the other.
        softmax: [routes, 2] float32, weight and T.
        counts: of the routes that are tallied, [Q, M] int64.
        widest: the largest R.
    """

    rows: torch.Tensor
    routes: torch.Tensor
    spans: torch.Tensor
    gates: torch.Tensor
    softmax: torch.Tensor
    counts: list[torch.Tensor]
    widest: int

    @classmethod
    def none(cls) -> Rows:
        """No rows."""
        empty = torch.zeros(0)
        return cls(empty, empty, empty, empty, empty, [], 0)


def suits(group: Group, total: int) -> bool:
    """Whether a group is computed row by row.

    Args:
        group: of a batch on the CPU.
        total: T, tokens of the batch.
    """
    if group.judged:
        return False  # its gates are known only while the pass runs
    narrow = group.columns <= NARROW or _size(group, total) * group.columns <= SMALL
    return bool(group.routes) or narrow


def rows(groups: Sequence[Group], total: int) -> Rows:
    """Groups as rows.

    Args:
        groups: at least one.
        total: T, tokens of the batch.
    """
    found = _Builder()
    for group in groups:
        found.add(group, _size(group, total))
    return found.rows(max(group.columns for group in groups))


def _size(group: Group, total: int) -> int:
    return total if group.tokens is None else len(group.tokens)


class _Builder:
    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._routes: list[Array] = []
        self._spans: list[Array] = []
        self._gates: list[Array] = []
        self._softmax: list[Array] = []
        self._counts: list[torch.Tensor] = []
        self._made = {"gates": 0, "routes": 0, "spans": 0}

    def add(self, group: Group, n: int) -> None:
        """Appends a group's n rows, their gates and their routes (a token's side by side)."""
        routes = self._made["routes"] + len(group.routes) * np.arange(n)
        tokens = np.arange(n) if group.tokens is None else group.tokens.numpy()
        gate = np.ones((n, group.columns)) if group.gate is None else group.gate.numpy()
        start = self._made["gates"] + group.columns * np.arange(n)
        bounds = [group.products, group.sums, group.columns]
        values = [tokens, group.slot, *bounds, start, routes, routes + len(group.routes)]
        self._rows.append(_table(n, values))
        self._gates.append(gate.ravel())
        if group.routes:
            made = [self._route(route, n) for route in group.routes]
            self._routes.append(np.stack([table for table, _ in made], 1).reshape(-1, 7))
            self._softmax.append(np.stack([softmax for _, softmax in made], 1).reshape(-1, 2))
        self._made["gates"] += n * group.columns
        self._made["routes"] += n * len(group.routes)

    def _route(self, route: Route, n: int) -> tuple[Array, Array]:
        """([n, 7], [n, 2]) of one route."""
        members = route.rows.stop - route.rows.start
        spans = _spans(route)
        tally, offset = -1, np.zeros(n)
        if route.tally is not None:
            tally, offset = len(self._counts), members * route.tally.requests.numpy()
            self._counts.append(route.tally.counts)
        first = self._made["spans"]
        values = [route.rows.start, members, first, first + len(spans)]
        self._spans.append(spans)
        self._made["spans"] += len(spans)
        softmax = np.stack([route.weight.numpy(), route.temperature.numpy()], 1)
        return _table(n, [*values, route.top_k.numpy(), tally, offset]), softmax

    def rows(self, widest: int) -> Rows:
        """What was added."""
        none = np.zeros(0)
        return Rows(
            _tensor(np.concatenate(self._rows), np.int64),
            _tensor(np.concatenate(self._routes or [none]), np.int64),
            _tensor(np.concatenate(self._spans or [none]), np.int64),
            _tensor(np.concatenate(self._gates), np.float32),
            _tensor(np.concatenate(self._softmax or [none]), np.float32),
            self._counts,
            widest,
        )


def _spans(route: Route) -> Array:
    """[spans, 3] member, first column, last column + 1."""
    members = np.arange(route.rows.stop - route.rows.start)
    starts = route.columns.start + np.searchsorted(route.member.numpy(), members)
    found = [np.stack([members, starts, np.append(starts[1:], route.columns.stop)], 1)]
    if route.ones is not None:
        columns, member = (part.numpy() for part in route.ones)
        found.append(np.stack([member, columns, columns + 1], 1))
    return np.concatenate(found)


def _table(n: int, columns: Sequence[Array | int]) -> Array:
    """[n, columns] int64."""
    found = np.empty((n, len(columns)), np.int64)
    for i, column in enumerate(columns):
        found[:, i] = column
    return found


def _tensor(array: Array, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype))
