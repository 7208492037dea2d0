"""What adapters cost, beside stock vLLM and MeteoRA's own two forms: Markdown tables.

    python -m load_tests.adapter_bench                     # about half an hour on 2 quiet cores
    python -m load_tests.adapter_bench --only idle packs   # some of the tables
    python -m load_tests.adapter_bench --rounds 1 --out result.json

Real engines, a base of 220 M random weights in bfloat16, adapters of rank 8 on all seven linear
layers. The engines of a table are up at the same time and asked in turn, round by round; every
ratio is taken within a round, and cells show the median over the rounds with the range. Ratios of
throughput: above 1 is faster than the baseline.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from load_tests.adapter_files import RANK, TASKS, modules, write_lora, write_pack
from load_tests.rounds import Engine, Round, Work, dearer, faster, rounds, running, table
from load_tests.shapes import BASE, write_model

PROMPT, DRAWN = 32, 40
LONG_PROMPT = 512
RESIDENT = (8, 32, 128)


class Bench:
    """The tables.

    Args:
        folder: for models and adapters.
        count: rounds, besides one to warm up.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self.found: dict[str, list[Round]] = {}
        write_model(folder / "base", BASE)

    def _kind(self, ours: bool, sets: int, rank: int, names: Sequence[str]) -> dict[str, Any]:
        adapters = {name: self._adapter(name) for name in names}
        base = str(self._folder / "base")
        return {"model": base, "ours": ours, "sets": sets, "rank": rank, "adapters": adapters}

    def _adapter(self, name: str) -> str:
        folder = self._folder / name
        if not folder.exists():
            (write_pack if name.startswith("pack") else write_lora)(folder, int(name[4:]))
        return str(folder)

    # --- (a) --------------------------------------------------------------------------------------

    def idle(self) -> str:
        """Adapters enabled, none in use."""
        kinds = {
            "plain vLLM, ms": self._kind(False, 0, 0, []),
            "Coxswain without adapters": self._kind(True, 0, 0, []),
            "with adapters, none loaded": self._kind(True, 8, RANK, []),
            "vLLM with LoRA, none loaded": self._kind(False, 8, RANK, []),
        }
        with running(kinds) as engines:
            works = {
                f"decode, {rows} rows": self._each(engines, [None] * rows, "decode")
                for rows in (1, 16)
            }
            prefill = {name: self._prefill(engine, None) for name, engine in engines.items()}
            works[f"prompt of {LONG_PROMPT}"] = prefill
            found = self.found["idle"] = rounds(self._count, works)
        relative = [
            {label: dict(list(work.items())[1:3]) for label, work in one.items()} for one in found
        ]
        return "\n\n".join(
            [
                "Throughput relative to plain vLLM:",
                table("", found, "plain vLLM, ms", faster),
                "Throughput relative to Coxswain without adapters:",
                table("", relative, "Coxswain without adapters", faster),
            ]
        )

    def _serve(
        self, engine: Engine, rows: Sequence[str | None], figure: str
    ) -> Callable[[], float]:
        """Measures rows; without their adapters in an engine that has none."""
        own = [name if engine.adapters else None for name in rows]

        def measure() -> float:
            found = engine.ask("serve", rows=own, prompt=PROMPT, drawn=DRAWN)
            return float(found[figure])

        return measure

    def _each(self, engines: Mapping[str, Engine], *work: Any) -> Work:
        return {name: self._serve(engine, *work) for name, engine in engines.items()}

    def _prefill(self, engine: Engine, name: str | None) -> Callable[[], float]:
        def measure() -> float:
            arguments = {"rows": [name], "prompt": LONG_PROMPT, "drawn": 1}
            times = [float(engine.ask("serve", **arguments)["prefill"]) for _ in range(3)]
            return statistics.median(times)

        return measure

    # --- (b) --------------------------------------------------------------------------------------

    def mixed(self) -> str:
        """Many adapters resident; rows use different ones."""
        found = [self._mixed(resident) for resident in RESIDENT]
        size = sum(RANK * (out + into) * 2 for out, into in modules().values())
        head = f"Memory of a slot of rank {RANK}: {size / 1e6:.1f} MB, taken whether used or not."
        return "\n\n".join([head, *found])

    def _mixed(self, resident: int) -> str:
        names = [f"lora{i}" for i in range(resident)]
        kinds = {
            "plain vLLM, no adapters, ms": self._kind(False, 0, 0, []),
            "Coxswain": self._kind(True, resident, RANK, names),
            "vLLM with LoRA": self._kind(False, resident, RANK, names),
        }
        some: list[str | None] = [None] * 4 + [names[7 * i % resident] for i in range(12)]
        with running(kinds) as engines:
            for engine in engines.values():
                engine.ask("load", names=engine.adapters)
            works = {
                "16 rows, 12 with adapters": self._each(engines, some, "decode"),
                f"{resident} rows, each another adapter": self._each(engines, names, "decode"),
                f"their prompts of {PROMPT}, in one step": self._each(engines, names, "prefill"),
            }
            found = self.found[f"mixed {resident}"] = rounds(self._count, works)
        head = f"{resident} adapters resident (`max_loras` {resident}), throughput:"
        return f"{head}\n\n" + table("", found, "plain vLLM, no adapters, ms", faster)

    # --- (c) --------------------------------------------------------------------------------------

    def packs(self) -> str:
        """MeteoRA relative to one LoRA, in our form and its authors'."""
        wide = TASKS * (RANK + 1)
        kinds = {
            "lora": self._kind(True, 8, RANK, ["lora0"]),
            "pack": self._kind(True, 2, wide, ["lora0", "pack0"]),
        }
        with running(kinds) as engines:
            lora, pack = engines["lora"], engines["pack"]
            lora.ask("load", names=["lora0"])
            pack.ask("load", names=["lora0", "pack0"])

            def formed(form: str | None, measure: Callable[[], float]) -> Callable[[], float]:
                def work() -> float:
                    pack.ask("form", name=form)
                    found = measure()
                    pack.ask("form", name=None)
                    return found

                return work

            def columns(measure: Callable[[Engine, str | None], Callable[[], float]]) -> Work:
                own = measure(pack, "pack0")
                return {
                    "one LoRA, ms": measure(lora, "lora0"),
                    "no adapter": measure(lora, None),
                    "one LoRA in a pack's slot": measure(pack, "lora0"),
                    "MeteoRA": own,
                    "MeteoRA, loop": formed("loop", own),
                    "MeteoRA, gathered": formed("gathered", own),
                }

            def decode(rows: int) -> Callable[[Engine, str | None], Callable[[], float]]:
                def measure(engine: Engine, name: str | None) -> Callable[[], float]:
                    return self._serve(engine, [name] * rows, "decode")

                return measure

            works = {f"decode, {rows} rows": columns(decode(rows)) for rows in (1, 8, 16)}
            works[f"prompt of {LONG_PROMPT}"] = columns(self._prefill)
            found = self.found["packs"] = rounds(self._count, works)
        head = f"Time of a step relative to one LoRA; the pack has {TASKS} adapters, top 2:"
        return f"{head}\n\n" + table("", found, "one LoRA, ms", dearer)

    # --- (d) --------------------------------------------------------------------------------------

    def loading(self) -> str:
        """How long running requests wait while adapters are loaded."""
        names = [f"lora{i}" for i in range(16 * (self._count + 1))]
        packs = [f"pack{i}" for i in range(2 * (self._count + 1))]
        kinds = {
            "loras": self._kind(True, 8, RANK, names),
            "packs": self._kind(True, 2, TASKS * (RANK + 1), packs),
        }
        with running(kinds) as engines:
            left = {"loras": iter(names), "packs": iter(packs)}

            def work(kind: str, take: int, ahead: bool) -> dict[str, float]:
                own = [next(left[kind]) for _ in range(take)]
                drawn = 250 if ahead else 40  # enough for all pieces to be read meanwhile
                asked = {"names": own, "rows": 8, "drawn": drawn, "ahead": ahead}
                found: dict[str, float] = engines[kind].ask("stall", **asked)
                return found

            labels = {
                "8 adapters of rank 8": ("loras", 8),
                f"a pack of {TASKS}": ("packs", 1),
            }
            found: list[Round] = []
            for i in range(self._count + 1):
                print(f"  round {i} of {self._count}", file=sys.stderr)
                one: Round = {}
                for label, (kind, take) in labels.items():
                    whole, pieces = work(kind, take, False), work(kind, take, True)
                    one[label] = {
                        "no loading, ms": pieces["step"],
                        "longest gap, in one go": whole["longest gap"],
                        "longest gap, in pieces": pieces["longest gap"],
                    }
                found.append(one)
        self.found["loading"] = found[1:]
        head = "Between two tokens of 8 running requests, relative to the median without loading:"
        return f"{head}\n\n" + table("loaded one by one", found[1:], "no loading, ms", dearer)


TABLES = {
    "idle": "Adapters enabled, none in use",
    "mixed": "Many adapters in one batch",
    "packs": "MeteoRA",
    "loading": "Loading while requests run",
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often to repeat (default 5)")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.rounds)
        for name in args.only:
            print(TABLES[name], file=sys.stderr)
            print(f"### {TABLES[name]}\n\n{getattr(bench, name)()}\n", flush=True)
            if args.out:
                args.out.write_text(json.dumps(bench.found, indent=1))


if __name__ == "__main__":
    main()
