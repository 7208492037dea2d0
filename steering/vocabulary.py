"""How a stream's vocabulary lies over the base's. Front end; the worker only reads the result.

The streams are summed id by id, so an id must mean the same token in all of them. Special and
added tokens may differ between a model and its tuned copies: those ids get no delta. Table rows
behind the last token (padding to a round number) are never sampled.

Letter: V is the base's embedding-table size, the number of scores that the server mixes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steering.errors import DoesNotFit

SHOWN = 3
"""How many differing ids an error message names."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens and the size of its embedding table.

    Args:
        tokens: id → token string, as the tokenizer stores it.
        table: rows of the embedding table; ids from here on cannot be read.
        special: ids of special and added tokens.
        eos: end-of-sequence id, or None.
        unk: unknown-token id, or None.
    """

    tokens: Mapping[int, str]
    table: int
    special: frozenset[int] = frozenset()
    eos: int | None = None
    unk: int | None = None

    @property
    def stand_in(self) -> int:
        """The id that this model reads for a token that it lacks: eos, else unk, else 0."""
        usable = (i for i in (self.eos, self.unk) if i is not None and 0 <= i < self.table)
        return next(usable, 0)


@dataclass(frozen=True, slots=True)
class Differing:
    """An id that means one token to the base and another, or none, to the stream."""

    id: int
    base: str
    stream: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """How one stream reads the base's ids. Compare with `to_wire()`.

    Args:
        shared: [V] bool, the id is the same token in both.
        padded: [P] int32, ids below V that are no token of the base; not shared.
        stand_in: what the stream reads for an id that it cannot read as itself.
        differing: the base's tokens that are not shared, by id.
        stream_table: rows of the stream's embedding table.
    """

    shared: npt.NDArray[np.bool_]
    padded: npt.NDArray[np.int32]
    stand_in: int
    differing: tuple[Differing, ...]
    stream_table: int
    read_as: npt.NDArray[np.int32] | None = field(init=False)
    """[V] int32, the stream's id for each of the base's; None if every id is read as itself."""

    def __post_init__(self) -> None:
        # A padded id is never sampled, but the engine's warm-up may feed any id below V.
        itself = self.shared.copy()
        itself[self.padded[self.padded < self.stream_table]] = True
        ids = np.arange(len(self.shared), dtype=np.int32)
        read_as = None if itself.all() else np.where(itself, ids, np.int32(self.stand_in))
        object.__setattr__(self, "read_as", read_as)

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON-able data: ranges of ids instead of arrays."""
        return {
            "size": len(self.shared),
            "unshared": _ranges(np.flatnonzero(~self.shared).tolist()),
            "padded": _ranges(self.padded.tolist()),
            "stand_in": self.stand_in,
            "differing": [[d.id, d.base, d.stream] for d in self.differing],
            "stream_table": self.stream_table,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Overlap:
        """The inverse of `to_wire`."""
        shared = np.ones(wire["size"], np.bool_)
        for start, stop in wire["unshared"]:
            shared[start:stop] = False
        padded = [np.arange(start, stop, dtype=np.int32) for start, stop in wire["padded"]]
        return cls(
            shared,
            np.concatenate([np.empty(0, np.int32), *padded]),
            wire["stand_in"],
            tuple(Differing(*entry) for entry in wire["differing"]),
            wire["stream_table"],
        )


def overlap(base: Vocabulary, stream: Vocabulary, *, name: str) -> Overlap:
    """Compares two vocabularies id by id.

    An id is shared iff it is the same token string in both and lies in both tables. A token that
    the stream lacks is not shared. So is a special or added token of the base that means
    something else to the stream.

    Args:
        base: the base's vocabulary; its ids from `base.table` on are left aside.
        stream: the stream's.
        name: the stream's name, for the error.

    Raises:
        DoesNotFit: a regular token of the base whose id means another token to the stream.
    """
    shared = np.zeros(base.table, np.bool_)
    differing: list[Differing] = []
    for token_id, token in sorted(base.tokens.items()):
        if not 0 <= token_id < base.table:
            continue
        other = stream.tokens.get(token_id) if token_id < stream.table else None
        if other == token:
            shared[token_id] = True
        else:
            differing.append(Differing(token_id, token, other))
    clashes = [d for d in differing if d.stream is not None and d.id not in base.special]
    if clashes:
        raise DoesNotFit(_clash(clashes, len(base.tokens)), field=f"streams.{name}")
    padded = np.array([i for i in range(base.table) if i not in base.tokens], np.int32)
    return Overlap(shared, padded, stream.stand_in, tuple(differing), stream.table)


def load_vocabulary(path: str) -> Vocabulary:
    """Reads a model's tokenizer and config.

    Args:
        path: a model folder or hub id.

    Raises:
        DoesNotFit: the folder has no config.json, or that names no vocabulary size.
        OSError, ValueError: what `transformers` raises when it cannot load the tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = {token_id: token for token, token_id in sorted(tokenizer.get_vocab().items())}
    special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
    return Vocabulary(tokens, _table(path), special, tokenizer.eos_token_id, tokenizer.unk_token_id)


def _table(path: str) -> int:
    """`vocab_size` of config.json, or of its `text_config` where the model has several parts."""
    from transformers.utils.hub import cached_file

    file = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False)
    config = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int):
        raise DoesNotFit("no vocab_size in its config.json", field="model", value=path)
    return size


def _clash(clashes: list[Differing], total: int) -> str:
    shown = ", ".join(f"{d.id} ({d.base!r} / {d.stream!r})" for d in clashes[:SHOWN])
    more = " and others" if len(clashes) > SHOWN else ""
    return (
        f"{len(clashes)} of the base's {total} token ids mean another token to this stream "
        f"(id, base / stream): {shown}{more}; models are mixed id by id, so they must share "
        "a tokenizer"
    )


def _ranges(ids: Iterable[int]) -> list[list[int]]:
    """Rising ids as [start, stop) pairs."""
    ranges: list[list[int]] = []
    for i in ids:
        if ranges and ranges[-1][1] == i:
            ranges[-1][1] = i + 1
        else:
            ranges.append([i, i + 1])
    return ranges
