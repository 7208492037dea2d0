"""What taps cost in a decode step, beside the same engine's unsteered step and one read-out alone.

    python -m load_tests.tap_bench [--rounds 5]    # about two minutes

A tap is one more read-out of the base. A linear sum of the base and taps is one product of the sum
of their hidden states; a rule reads out each of its own, and DoLa and SLED compare whole
distributions besides. Random weights of `load_tests.shapes.BASE`, bfloat16, compiled.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load_tests.rounds import Engine, Round, Work, dearer, rounds, running, spread, table
from load_tests.shapes import BASE, write_model

ROWS, PROMPT, DRAWN = (1, 16), 32, 24

TAPS = {f"early{layer}": layer for layer in (0, 2, 4, 6)}

READ, PLAIN = "a read-out alone", "unsteered, ms"
STEERING: dict[str, dict[str, Any]] = {
    "mix, 1 tap": {"method": "mix", "weights": {"base": 1.0, "early4": -0.3}},
    "contrastive, 1 tap": {"method": "contrastive", "amateur": "early4"},
    "dola, 1 tap": {"method": "dola", "layers": ["early4"]},
    "dola, 4 taps": {"method": "dola", "layers": list(TAPS)},
    "sled, 4 taps": {"method": "sled", "layers": list(TAPS)},
}
"""Column → the steering object of its rows."""


def _work(engine: Engine, name: str | None, rows: int) -> Callable[[], float]:
    def measure() -> float:
        found = engine.ask("serve", rows=[name] * rows, prompt=PROMPT, drawn=DRAWN)
        return float(found["decode"])

    return measure


def works(engine: Engine) -> dict[str, Work]:
    """Workload → column → what measures it, milliseconds."""
    found: dict[str, Work] = {}
    for n in ROWS:
        work: Work = {PLAIN: _work(engine, None, n)}
        work |= {name: _work(engine, name, n) for name in STEERING}
        work[READ] = lambda n=n: float(engine.ask("read_out", rows=n))  # type: ignore[misc]
        found[f"{n} {'row' if n == 1 else 'rows'}"] = work
    return found


def tables(found: list[Round]) -> str:
    """Ratios to the unsteered step; and what is added to it, in read-outs."""
    lines = ["| added, in read-outs | a read-out, ms | " + " | ".join(STEERING) + " |"]
    lines.append("|---" * (len(STEERING) + 2) + "|")
    for label in found[0]:
        cells = [f"{statistics.median(one[label][READ] for one in found):.2f}"]
        for name in STEERING:
            cells.append(spread([(one[label][name] - one[label][PLAIN]) / one[label][READ]
                                 for one in found]))  # fmt: skip
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return table("decode step", found, PLAIN, dearer) + "\n\n" + "\n".join(lines)


def kind(folder: Path) -> dict[str, Any]:
    """The engine, as `adapter_engine.Driven` takes it."""
    return {"model": str(folder / "base"), "ours": True, "sets": 0, "rank": 0, "adapters": {},
            "taps": TAPS, "steering": STEERING}  # fmt: skip


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.tap_bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="how often to repeat (default 5)")
    count = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "base", BASE)
        with running({"taps": kind(Path(folder))}) as engines:
            print(tables(rounds(count, works(engines["taps"]))))


if __name__ == "__main__":
    main()
