"""What steering vectors cost: in a decode step, when they are loaded under load, and a thousand.

    python -m load_tests.vector_bench [--rounds 5] [--vectors 1000] [--only cost|served] [--small]

`cost`: engines are asked in turn: without adapters, with adapters, and with adapters and vectors
(`adapters.vectors`); rows have none, or one on all layers. `served`: over HTTP, see
`load_tests.vectors_served`; `--small` tries it with a tiny model. Random weights, bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load_tests import vectors_served
from load_tests.adapter_files import write_vector
from load_tests.rounds import Engine, Round, Work, dearer, rounds, running, table
from load_tests.shapes import BASE, write_model

ROWS, PROMPT, DRAWN, RANK, SLOTS = (1, 16), 32, 24, 8, 16

ALONE, LORA, FREE = "no adapters, ms", "adapters, no vectors", "vectors, none in use"
ONE, MANY = "a vector on all layers", "another vector for each row"


def _work(engine: Engine, rows: list[str | None]) -> Callable[[], float]:
    def measure() -> float:
        found = engine.ask("serve", rows=rows, prompt=PROMPT, drawn=DRAWN)
        return float(found["decode"])

    return measure


def works(engines: dict[str, Engine], names: list[str]) -> dict[str, Work]:
    """Workload → column → what measures a decode step, milliseconds.

    Args:
        engines: by the columns `ALONE`, `LORA` and `FREE`.
        names: the vectors that the last one has loaded, as many as the most rows.
    """
    found: dict[str, Work] = {}
    for n in ROWS:
        work: Work = {name: _work(engine, [None] * n) for name, engine in engines.items()}
        work[ONE] = _work(engines[FREE], [names[0]] * n)
        if n > 1:
            work[MANY] = _work(engines[FREE], [*names[:n]])
        found[f"{n} {'row' if n == 1 else 'rows'}"] = work
    return found


def tables(found: list[Round]) -> str:
    """Beside an engine without adapters; and beside the same engine's rows without a vector."""
    own = [{label: {name: figure for name, figure in work.items() if name in (FREE, ONE, MANY)}
            for label, work in one.items()} for one in found]  # fmt: skip
    return "\n\n".join(
        table("decode step", each, base, dearer) for each, base in ((found, ALONE), (own, FREE))
    )


def kinds(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The engines, as `adapter_engine.Driven` takes them."""
    adapters = {name: str(folder / name) for name in names}
    common: dict[str, Any] = {"model": str(folder / "base"), "ours": True, "rank": RANK}
    return {
        ALONE: {**common, "sets": 0, "adapters": {}},
        LORA: {**common, "sets": SLOTS, "adapters": {}},
        FREE: {**common, "sets": SLOTS, "adapters": adapters, "engine": {"vectors": True}},
    }


def cost(folder: Path, count: int) -> str:
    """The tables of a decode step.

    Args:
        folder: for the models.
        count: rounds.
    """
    write_model(folder / "base", BASE)
    names = [f"vector{i}" for i in range(max(ROWS))]
    for i, name in enumerate(names):
        write_vector(folder / name, i)
    with running(kinds(folder, names)) as engines:
        engines[FREE].ask("load", names=names)
        return tables(rounds(count, works(engines, names)))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.vector_bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="of `cost` (default 5)")
    parser.add_argument("--vectors", type=int, default=1000, help="of `served` (default 1000)")
    parser.add_argument("--small", action="store_true", help="`served`: a tiny model")
    parser.add_argument("--only", choices=("cost", "served"), help="one part of it")
    given = parser.parse_args()
    if not 1 <= given.vectors <= vectors_served.MOST:
        parser.error(f"--vectors: 1 to {vectors_served.MOST}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if given.only != "served":
            print(cost(Path(folder) / "cost", given.rounds), flush=True)
        if given.only != "cost":
            print(vectors_served.run(Path(folder), given.vectors, small=given.small))
    print(f"{time.monotonic() - begun:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
