"""The adapter sum on a GPU: the tables of a step in device memory, and the launches of a layer.

The tables are written once per stream batch, in one copy from the host, and read by every layer;
nothing here waits for the device. They stay where they are, and how kernels are compiled and
launched depends on the layer and the number of tokens alone. So a recorded graph keeps working
when the tables are written anew, and empty tables add nothing, to the bit.

Held to the definition through Triton's interpreter on the CPU, and compiled for NVIDIA GPUs in the
tests; block sizes are chosen by reasoning, not by measurement (`load_tests/adapter_kernel_bench`).

Letters: T tokens, P positions and N tiles (`adapters.kernels.lines.Tiles`), L lines, R columns and
G gate rows of a set, K rank indices of a slot up to the next power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton

from adapters.kernels.gated import InPlace
from adapters.kernels.lines import Int32, Line, Lines, Tiles, most_tiles
from adapters.kernels.triton_kernels import HEAD, expand, gate, score, shrink

INTERPRETED = triton.knobs.runtime.interpret
"""Whether this process runs kernels in Triton's interpreter. Fixed when Triton is imported."""

FEWEST = 16
"""The smallest side of a matrix product in Triton."""


@dataclass(frozen=True)
class Blocks:
    """How the work of a layer is cut.

    Args:
        tokens: of a tile. A tile reads its set's weights once, so tokens of one set should share
            one; but in decode most sets have a few tokens, and the rest of the tile is wasted.
        rows: of A, per program.
        into: columns of x, per step of a program.
        columns: of B, per step of a program.
        out: rows of B, per program.
        splits: programs that share a tile's x. A few tokens give few tiles, too few to read A
            with the whole GPU.
        warps: of a program, so that its sums fit into registers.
    """

    tokens: int
    rows: int
    into: int
    columns: int
    out: int
    splits: int
    warps: int

    @classmethod
    def of(cls, tokens: int, ranks: int) -> Blocks:
        """For T tokens and slots of K rank indices."""
        size = 16 if tokens <= 128 else 32 if tokens <= 1024 else 64
        splits = 16 if tokens <= 32 else 4 if tokens <= 256 else 1
        return cls(
            tokens=size,
            rows=min(ranks, 64),
            into=128 if size == FEWEST else 64,
            columns=min(ranks, 32),
            out=64 if size == FEWEST else 128,
            splits=splits,
            warps=4 if size == FEWEST else 8,
        )


CLASSES = (1, 129, 1025)
"""Numbers of tokens, one for each way that kernels are compiled: see `Blocks.of`."""


class AdapterTables:
    """The tables of the latest step, in device memory of fixed place and size.

    Belongs to one stream of one worker process. `adapters.kernels.triton_kernels` says what is in
    them. Of the lines only those of the step are written; the rest is never read. At first the
    tables are empty: kernels that read them add nothing.

    Args:
        device: that the layers run on.
        tokens: the most tokens of a step, padding included.
        lines: the most lines of a step.
        slots: of the engine.
        ranks: rank indices of a slot.
    """

    def __init__(
        self, device: torch.device, tokens: int, lines: int, slots: int, ranks: int
    ) -> None:
        self.slots = slots
        self.ranks = max(FEWEST, triton.next_power_of_2(ranks))
        self.most_tokens, self.most_lines = tokens, lines
        # The width of the tables' tiles; 0 while there are none.
        self.tile = 0
        # Whether scores are summed over ranks. All of them know alike that a step has no gates;
        # empty tables may be those that a graph is recorded with.
        self.gated = True
        # From addresses of 16 bytes Triton loads faster. The lines come last, so that the copy
        # ends with the step's last line.
        self._parts = (
            FEWEST,
            4 * most_tiles(tokens, slots, FEWEST),
            -(-tokens // 4) * 4,
            -(-tokens // 4) * 4,
            lines * (HEAD.value + self.ranks // 2 * 7),
        )
        self._all = torch.zeros(sum(self._parts), dtype=torch.int32, device=device)
        self.counting, self.tiles, self.lines, self.tokens, self.table = self._all.split(
            self._parts
        )
        self.lines.fill_(-1)
        # In place of `counting` where nothing is counted.
        self.never = torch.zeros_like(self.counting)
        # A member has a gate row and at least one column.
        self.counts = torch.zeros(lines, self.ranks // 2, dtype=torch.int32, device=device)

    def blocks(self, total: int) -> Blocks:
        """How the work is cut of a layer that sees so many tokens."""
        return Blocks.of(total, self.ranks)

    def write(self, lines: Lines, total: int, counting: bool = False) -> None:
        """Writes the tables of a step: `packed`, brought to the device, and `put`."""
        staged = torch.from_numpy(self.packed(lines, total, counting))
        if self._all.is_cuda:
            # Pinned by PyTorch's allocator, which keeps it until the copy is done.
            staged = staged.pin_memory()
        self.put(staged, lines, total, counting)

    def packed(self, lines: Lines, total: int, counting: bool = False) -> Int32:
        """The tables of a step, on the host.

        Args:
            lines: the step's lines; tokens beyond its T use none.
            total: tokens that the layers will see, padding included, ≥ T.
            counting: whether `counts` starts at 0 and grows by 1 for each member that a token is
                routed to, in every packed layer.
        """
        assert lines.tokens.size <= total <= self.most_tokens
        assert len(lines.lines) <= self.most_lines
        tiles = Tiles.of(lines, self.blocks(total).tokens)
        line = self._parts[4] // self.most_lines
        start = sum(self._parts[:4])
        host = np.zeros(start + len(lines.lines) * line, np.int32)
        settings, cut, places, tokens, table = np.split(host, np.cumsum(self._parts[:4]))
        settings[0] = counting
        cut[: 4 * tiles.slots.size] = np.stack(
            [tiles.slots, tiles.starts, tiles.ends, tiles.first_lines], axis=1
        ).ravel()
        places[:] = -1
        places[: tiles.lines.size] = tiles.lines
        tokens[: tiles.tokens.size] = tiles.tokens
        for row, own in zip(table.reshape(-1, line), lines.lines, strict=True):
            row[:] = _packed(own, self.ranks)
        return host

    def put(self, packed: torch.Tensor, lines: Lines, total: int, counting: bool) -> None:
        """Puts tables in their place.

        Args:
            packed: what `packed` returned for the other arguments, on this device, or pinned.
            lines: as given to `packed`.
            total: likewise.
            counting: likewise.
        """
        self.tile = self.blocks(total).tokens if lines.lines else 0
        self.gated = not lines.lines or any(line.gates for line in lines.lines)
        self._all[: packed.numel()].copy_(packed, non_blocking=True)
        if counting:
            self.counts.zero_()


@lru_cache(4096)
def _packed(line: Line, ranks: int) -> Int32:
    """A line's row of the table."""
    row = np.zeros(HEAD.value + ranks // 2 * 7, np.int32)
    row[: HEAD.value] = line.columns, line.gates, line.products, line.sums
    parts = np.split(row[HEAD.value :], np.cumsum([ranks, ranks, ranks // 2, ranks // 2]))
    values = (line.weight, line.member, line.artefact, line.top_k, line.temperature)
    for part, own in zip(parts, values, strict=True):
        part[: own.size] = own.view(np.int32)
    return row


def add_adapters(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    sizes: Sequence[int],
    tables: AdapterTables,
    over_ranks: InPlace | None = None,
    *,
    routed: bool = True,
) -> None:
    """Adds the adapters' part of one linear layer, which may pack several (q, k, v).

    Each packed layer has its own A, B and gates. Three launches, whatever the tables hold; where
    learned gates need the scores of other ranks, one more and the sum.

    Args:
        y: [T, Σ sizes] float32, bfloat16 or float16; changed in place, only rows of tokens that
            have a line.
        x: [T, in] in the dtype of y.
        a: per packed layer, [slots, 1, ≥ R + G, in] in the dtype of y; all strided alike.
        b: per packed layer, [slots, 1, ≥ size, ≥ R] in the dtype of y, whose rows or columns are
            contiguous; all in the same way.
        sizes: columns of `y` that each packed layer takes, from the left.
        tables: written for T tokens, or empty.
        over_ranks: as in `adapters.kernels.gated.add_adapters`.
        routed: whether packs may have gates here; else nothing is counted.
    """
    total, ranks = x.shape[0], tables.ranks
    cut = tables.blocks(total)
    assert y.shape[0] == total <= tables.most_tokens
    assert tables.tile in (0, cut.tokens)
    assert all(part.dtype == y.dtype for part in (x, *a, *b))
    assert all(part.stride() == a[0].stride() and part.stride(-1) == 1 for part in a)
    # Adjacent in memory are the numbers of a row of B, or those of a column.
    across = b[0].stride(3) != 1
    assert all(part.stride(2 if across else 3) == 1 for part in b)
    layers, into = len(sizes), x.shape[1]
    tiles = most_tiles(total, tables.slots, cut.tokens)
    if not tiles:
        return
    wide = INTERPRETED and y.dtype == torch.bfloat16
    u = torch.empty(cut.splits, layers, total, ranks, device=x.device)
    v = torch.empty(layers, total, ranks, dtype=x.dtype, device=x.device)
    steps = (u.stride(0), u.stride(1))
    shrink[tiles * cut.splits, triton.cdiv(ranks, cut.rows), layers](
        *(x, x.stride(0), x.stride(1), into),
        *(tuple(a), a[0].stride(0), a[0].stride(2)),
        *(u, cut.splits, *steps),
        *(tables.tiles, tables.tokens, tables.table),
        RANKS=ranks,
        TOKENS=cut.tokens,
        ROWS=cut.rows,
        INTO=cut.into,
        WIDE=wide,
        num_warps=cut.warps,
    )
    scores = u
    if over_ranks is not None and tables.gated:
        scores = torch.zeros(layers, total, ranks // 2, device=x.device)
        score[total, layers](
            *(u, cut.splits, *steps, scores),
            *(tables.lines, tables.table),
            RANKS=ranks,
        )
        over_ranks(scores)
    gate[total, layers](
        *(u, cut.splits, *steps, v, scores),
        *(tables.counting if routed else tables.never, tables.lines, tables.table, tables.counts),
        RANKS=ranks,
        SPLIT=over_ranks is not None,
        num_warps=4 if ranks <= 64 else 8,
    )
    expand[tiles, sum(triton.cdiv(size, cut.out) for size in sizes)](
        *(y, y.stride(0), y.stride(1), v, v.stride(0)),
        *(tuple(b), tuple(part.stride(0) for part in b)),
        *(tuple(part.stride(3 if across else 2) for part in b), b[0].shape[3], tuple(sizes)),
        *(tables.tiles, tables.tokens, tables.table),
        RANKS=ranks,
        TOKENS=cut.tokens,
        COLUMNS=cut.columns,
        OUT=cut.out,
        ACROSS=across,
        WIDE=wide,
        num_warps=cut.warps,
    )
