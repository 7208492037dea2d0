"""`python -m smollm.evidence`: measures the claims and writes docs/reports/evidence.md."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from smollm.convert import MODEL, convert_package
from smollm.evidence.claim import Claim
from smollm.evidence.page import FOLDER, NAMES, PAGE, QUOTING, claims, publish, quoting, whole
from smollm.evidence.work import Work


def measure(name: str, work: Work) -> Claim:
    """Runs a claim's module, with the time it took."""
    start = time.monotonic()
    found = importlib.import_module(f"smollm.evidence.{name}").run(work)
    assert isinstance(found, Claim)
    now = datetime.now(UTC)
    return replace(found, seconds=time.monotonic() - start, date=f"{now:%B %Y}")


def main() -> int:
    """The command's exit status: 1 if a claim could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m smollm.evidence", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME",
                        help=f"these claims, of {', '.join(NAMES)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="a few items, to see that it runs; figures and page go to "
                        "build/smollm/evidence/quick")  # fmt: skip
    parser.add_argument("--page", action="store_true", help="only makes the page from the JSON")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the base")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    build = MODEL.parent / "evidence"
    out, page = (build / "quick", build / "quick.md") if args.quick else (FOLDER, PAGE)
    failed = []
    if not args.page:
        convert_package(args.model)
        for name in args.only:
            print(f"{name} ...", flush=True)
            try:
                found = measure(name, Work(args.model, build / name, args.quick, args.seed))
            except Exception as error:  # the other claims can still be measured
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            publish(found, out)
            verdict = "holds" if found.holds else "does not hold"
            print(f"{name} {verdict}, {found.seconds:.0f} s", flush=True)
    page.write_text(whole(PAGE.read_text("utf-8"), claims(out)), "utf-8")
    for other in () if args.quick else QUOTING:
        text = other.read_text("utf-8")
        other.write_text(quoting(text, other, claims(out)), "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
