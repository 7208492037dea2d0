"""Two tenants under load: `python -m load_tests.tenants`.

Two API keys, each limited to a profile and an adapter of its own, on one server with its prefix
cache on. Both ask all the time, while one of them tries to learn of the other: by names, usage,
metrics, the cache and time. Exit status 1: it learned something, or could not have.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from load_tests.clients.__main__ import machine
from load_tests.tenants import names, timing
from load_tests.tenants.findings import Finding, into
from load_tests.tenants.load import under_load
from load_tests.tenants.stage import (
    MATE,
    NAMES,
    Prompts,
    Tenant,
    adapter_of,
    configuration,
    profile_of,
)
from load_tests.with_server import NotReadyError, running_server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reports" / "tenants.md"


def tried(url: str, rounds: int, seed: int) -> Iterator[Finding]:
    """All that is tried, one after the other.

    Args:
        url: of the server.
        rounds: of each timing.
        seed: of prompts and orders.
    """
    me, you = (Tenant(name, url) for name in NAMES)
    yield names.rates(me, you)
    with under_load(url, seed + 1) as book:
        for one, other in ((me, you), (you, me)):
            yield from names.hidden(one, other)
            yield from names.alike(one, other)
        yield from names.metrics(me, you)
        yield names.stored(me, you)
        yield names.errors_in_time(me, you, 3 * rounds, seed)
        prompts = Prompts(seed)
        mate = Tenant(MATE, url)
        for where, models in (
            ("the base", ["base", "base"]),
            ("profiles that steer alike", [profile_of(name) for name in NAMES]),
            ("adapters of the same content", [adapter_of(name) for name in NAMES]),
        ):
            asking = timing.Asking(me, mate, you, *models)
            yield from timing.judged(where, *timing.measured(asking, prompts, rounds, seed))
        yield timing.salted(me, you, prompts)
    yield book.finding()


def run(rounds: int, seed: int) -> list[Finding]:
    """Starts a server and tries everything; prints what is found as it comes.

    Raises:
        NotReadyError: the server did not start.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "server.yaml"
        config.write_text(yaml.safe_dump(configuration(Path(folder))))
        with running_server(config) as url:
            for one in tried(url, rounds, seed):
                mark = "LEAK" if one.leak else "ok  "
                print(f"{mark} {one.what}: {one.shown} {one.leak}", flush=True)
                found.append(one)
    return found


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.tenants", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="of each timing (default: 100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=PAGE, help="the page with the table")
    args = parser.parse_args()
    begin = time.monotonic()
    try:
        found = run(args.rounds, args.seed)
    except NotReadyError as error:
        print(error, file=sys.stderr)
        return 1
    leaks = sum(bool(one.leak) for one in found)
    print(f"{len(found)} tried, {leaks} leaked something, {time.monotonic() - begin:.0f} s")
    args.out.write_text(into(args.out.read_text(), found, machine()))
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
