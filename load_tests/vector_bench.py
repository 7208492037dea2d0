"""What a vector behind every decoder layer costs on a CPU, in one run; and what hot-loading one
does to requests that decode.

    python -m load_tests.vector_bench [--rounds 5]

Engines are asked in turn: one without room for vectors, one with; rows have no adapter, or one
vector on all layers. Random weights of `load_tests.shapes.BASE`, bfloat16, compiled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from load_tests.rounds import Engine, rounds, running, table
from load_tests.shapes import BASE, write_model

ROWS, PROMPT, DRAWN, RANK, SLOTS = (1, 16), 32, 24, 8, 16


def write_vector(folder: Path, seed: int) -> None:
    """A constant behind every decoder layer of the base."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{n}": 0.05 * torch.randn(BASE["hidden_size"], generator=random)
        for n in range(BASE["num_hidden_layers"])
    }
    save_file(tensors, folder / "vectors.safetensors")
    (folder / "vector_config.json").write_text(json.dumps({"kind": "vector"}))


def _asking(engine: Engine, name: str | None, rows: int) -> Callable[[], float]:
    def measure() -> float:
        found = engine.ask("serve", rows=[name] * rows, prompt=PROMPT, drawn=DRAWN)
        return float(found["decode"])

    return measure


def run(folder: Path, count: int) -> str:
    """The tables.

    Args:
        folder: for the models.
        count: rounds.
    """
    write_model(folder / "base", BASE)
    names = [f"vector{i}" for i in range(12)]
    for i, name in enumerate(names):
        write_vector(folder / name, i)
    common: dict[str, Any] = {"model": str(folder / "base"), "ours": True, "sets": SLOTS,
                              "rank": RANK}  # fmt: skip
    adapters = {name: str(folder / name) for name in names}
    kinds = {
        "without": {**common, "adapters": {}},
        "with": {**common, "adapters": adapters, "engine": {"vectors": True}},
    }
    with running(kinds) as engines:
        engines["with"].ask("load", names=names[:1])
        works = {
            f"{rows} rows": {
                "no room for vectors, ms": _asking(engines["without"], None, rows),
                "no vector": _asking(engines["with"], None, rows),
                "a vector on all layers": _asking(engines["with"], names[0], rows),
            }
            for rows in ROWS
        }
        measured = table("decode step", rounds(count, works), "no room for vectors, ms",
                         lambda figure, base: figure / base)  # fmt: skip
        gaps = engines["with"].ask("stall", names=names[1:], rows=8, drawn=50, ahead=True)
    room = 2 * RANK * BASE["hidden_size"] * 2 * BASE["num_hidden_layers"]
    return (
        f"{measured}\n\nhot-load: {gaps}, ms, of {len(names) - 1} vectors while 8 requests decode\n"
        f"room: {room / 2**20:.2f} MiB for each slot of rank {RANK}"
    )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often to repeat (default 5)")
    count = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), count))


if __name__ == "__main__":
    main()
