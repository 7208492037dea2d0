"""Random loads, injected failures, retries, unloads and requests against a real server for hours.

    python -m load_tests.load_soak                          # two hours, as `make load-soak`
    python -m load_tests.load_soak --minutes 15 --slots 2 --out /tmp/load-faults.json

Four owners change two names each, and ask for them: adapters, mixes of two, a pack. There are
fewer slots than names, so that almost every request loads a set into a slot that another one had.
Meanwhile loads fail in the worker at a random point (`tests.faulty`), or come later than the server
waits for them. Every answer is compared with what PEFT computes; every failure must be one that was
injected, and say whose fault it is. Before each load the worker looks at its slots: one that no set
is in must be empty. The exit status is 1 if anything was wrong.
Figures: docs/reports/load-faults.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from load_tests.load_report import machine
from tests.faulty import ERRORS, FILE, TIMEOUT, broken, give_wish
from tests.injected import POINTS
from tests.server.adapting.answers import TOLERANCE
from tests.server.adapting.expected import CONTENTS, Kind, Oracle, make_adapters
from tests.server.adapting.kit import configuration
from tests.server.live import Server, make_models

ROOT = Path(__file__).parents[1]
OWNERS, NAMES = 4, 2
TIMEOUT_S = 1.0
"""Limit of the server's remote calls."""
PATIENCE_S = 120.0
LAYERS = 8
"""Layers that can be changed in the base: a fault may be in any of them."""
SOURCES = ("a", "b", *CONTENTS, "pack")
REASONS = ("no memory", "cannot read the files", "Injected: a bug", "broken", "did not answer")


@dataclass
class Weather:
    """When loads fail; one file for all.

    Args:
        file: what the worker reads.
        dice: of its own.
        storms: (begin, end) of each time in which something was wished for; `time.monotonic`.
        wished: how often each fault.
    """

    file: Path
    dice: random.Random
    storms: list[list[float]] = field(default_factory=list)
    wished: Counter[str] = field(default_factory=Counter)

    async def change(self, until: float) -> None:
        """Faults come and go."""
        while time.monotonic() < until:
            await asyncio.sleep(self.dice.uniform(0.3, 2.5))
            wish = self._wish()
            self.wished[wish.get("error", "late") + " at " + wish.get("point", "the end")] += 1
            self.storms.append([time.monotonic(), float("inf")])
            give_wish(self.file, wish)
            await asyncio.sleep(self.dice.uniform(0.1, 1.5))
            self.file.unlink()
            self.storms[-1][1] = time.monotonic()

    def _wish(self) -> dict[str, Any]:
        if self.dice.random() < 0.15:
            return {"slow_s": self.dice.uniform(0.5, 2.5) * TIMEOUT_S}
        return {"point": self.dice.choice(POINTS), "after": self.dice.randrange(LAYERS),
                "error": self.dice.choice(ERRORS)}  # fmt: skip

    def bad(self, begin: float) -> bool:
        """Whether something may have failed since `begin`; late loads hold up those behind them."""
        return any(end > begin - 6 * TIMEOUT_S for _, end in self.storms)


@dataclass
class Tally:
    """What happened.

    Args:
        counts: by what.
        worst: largest error of a log-probability.
        wrong: what must not be; any of them fails the soak.
    """

    counts: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def bad(self, text: str) -> None:
        """Something that must not be."""
        self.counts["WRONG"] += 1
        self.wrong.append(f"{time.strftime('%H:%M:%S')} {text}"[:600])
        print(self.wrong[-1], file=sys.stderr, flush=True)


class Owner:
    """The only one who changes some names, so it knows what they stand for.

    Args:
        http: the server.
        folders: adapters by content.
        oracle: the right answers.
        weather: when failures are fine.
        tally: of all owners.
        names: its own.
        dice: its own.
    """

    def __init__(
        self, http: httpx.AsyncClient, folders: dict[str, Path], oracle: Oracle, weather: Weather,
        tally: Tally, names: list[str], dice: random.Random,
    ) -> None:  # fmt: skip
        self._http, self._folders, self._oracle = http, folders, oracle
        self._weather, self._tally, self._dice = weather, tally, dice
        self.holds: dict[str, str | None] = dict.fromkeys(names)
        self._before: dict[str, tuple[str | None, float]] = {}

    async def work(self, until: float) -> None:
        """Acts until it is over."""
        while time.monotonic() < until:
            name = self._dice.choice(list(self.holds))
            held, throw = self.holds[name], self._dice.random()
            if held is None:
                await self.load(name, self._dice.choice(SOURCES))
            elif throw < 0.10:
                await self.unload(name)
            elif throw < 0.25:
                others = [source for source in SOURCES if source != held]
                await self.load(name, self._dice.choice(others), replace=True)
            else:
                await self.ask(name)

    async def load(self, name: str, content: str, replace: bool = False) -> None:
        """Posts it; until it is ready, at once or at the fourth attempt at the latest."""
        for attempt in range(4):
            begin = time.monotonic()
            body = {"name": name, "source": str(self._folders[content]), "replace": replace}
            answer = await self._http.post("/admin/adapters", json=body)
            if answer.status_code != 202:
                self._tally.bad(f"load of {name}: {answer.status_code} {answer.text}")
                return
            record = await self._settled(name)
            if record["state"] == "ready":
                what = "loads after a failed one" if attempt else "loads"
                self._tally.counts[what] += 1
                self._before[name] = (self.holds[name], time.monotonic())
                self.holds[name] = content
                await self.ask(name)
                return
            self._tally.counts[f"failed loads, {record['fault']}'s fault"] += 1
            self._judge(f"load of {name}", begin, str(record["reason"]))
            wanted = "adapter" if "broken" in str(record["reason"]) else "server"
            if record["fault"] != wanted:
                self._tally.bad(f"load of {name}: whose fault? {record}")
            await self._after_failure(name)
            await asyncio.sleep(self._dice.uniform(0, 1))

    async def _after_failure(self, name: str) -> None:
        """What was there before goes on; where nothing was, nothing is."""
        if self.holds[name] is not None:
            await self.ask(name)
            return
        answer = await self._http.post("/v1/completions", json=_one("a").body({"a": name}))
        if answer.status_code != 404:
            self._tally.bad(f"{name} failed to load, and answers {answer.status_code}")

    async def _settled(self, name: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            answer = await self._http.get(f"/admin/adapters/{name}")
            found: dict[str, Any] = answer.json()
            if answer.status_code != 200:
                self._tally.bad(f"look at {name}: {answer.status_code} {answer.text}")
            elif found["state"] in ("ready", "failed"):
                return found
            await asyncio.sleep(0.05)
        raise TimeoutError(f"{name} is neither ready nor failed: {found}")

    async def unload(self, name: str) -> None:
        """Until nothing knows it any more."""
        await self._http.delete(f"/admin/adapters/{name}")
        self.holds[name] = None
        for _ in range(int(PATIENCE_S / 0.05)):
            if not await self._known(name):
                break
            await asyncio.sleep(0.05)
        self._tally.counts["unloads"] += 1
        answer = await self._http.post("/v1/completions", json=_one("a").body({"a": name}))
        if answer.status_code != 404:
            self._tally.bad(f"{name} is unloaded, and answers {answer.status_code}")

    async def _known(self, name: str) -> bool:
        return (await self._http.get(f"/admin/adapters/{name}")).status_code != 404

    async def ask(self, name: str) -> bool:
        """One request; whether it was answered, exactly."""
        held = self.holds[name]
        assert held is not None
        kind, names = _one(held, self._dice.randrange(2)), {held: name}
        other = next((o for o in self.holds if o != name), name)
        second = self.holds[other]
        if second not in (None, held) and self._dice.random() < 0.3:
            assert second is not None
            kind = Kind((*kind.used, (second, 0.5, None, None)), prompt=kind.prompt)
            names[second] = other
        begin = time.monotonic()
        answer = await self._http.post("/v1/completions", json=kind.body(names))
        if answer.status_code != 200:
            self._tally.counts[f"requests refused with {answer.status_code}"] += 1
            self._judge(f"request of {names}", begin, answer.text)
            if answer.status_code not in (422, 500, 503):
                self._tally.bad(f"request of {names}: {answer.status_code} {answer.text}")
            return False
        choice = answer.json()["choices"][0]
        right = self._oracle(kind)
        error = right.error(choice["token_ids"], choice["logprobs"]["token_logprobs"])
        self._tally.counts["answers compared"] += 1
        if error > TOLERANCE:
            before = {n: (was, time.monotonic() - at) for n, (was, at) in self._before.items()}
            self._tally.bad(f"request of {names} (before that, and seconds since: {before}): "
                            f"error {error}, got {choice}, want {right}")  # fmt: skip
            return False
        self._tally.worst = max(self._tally.worst, error)
        return True

    def _judge(self, what: str, begin: float, reason: str) -> None:
        """A failure must be one of ours."""
        if not self._weather.bad(begin):
            self._tally.bad(f"{what} failed in fair weather: {reason}")
        if not any(known in reason for known in REASONS):
            self._tally.bad(f"{what} failed for another reason: {reason}")


def _one(content: str, prompt: int = 0) -> Kind:
    return Kind(((content, 1.0, None, None),), prompt=prompt)


async def soak(
    server: Server, folders: dict[str, Path], oracle: Oracle, file: Path, seed: int, minutes: float
) -> Tally:
    """Everything that happens between the server's start and its end."""
    tally, dice = Tally(), random.Random(seed)
    weather = Weather(file, random.Random(dice.random()))
    until = time.monotonic() + 60 * minutes
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as http:
        owners = [
            Owner(http, folders, oracle, weather, tally, [f"n{o}-{i}" for i in range(NAMES)],
                  random.Random(dice.random()))
            for o in range(OWNERS)
        ]  # fmt: skip
        telling = asyncio.create_task(_tell(tally, until))
        async with asyncio.TaskGroup() as group:
            group.create_task(weather.change(until))
            for owner in owners:
                group.create_task(owner.work(until))
        telling.cancel()
        await asyncio.sleep(6 * TIMEOUT_S)
        weather.storms.clear()  # from here on nothing may fail
        for owner in owners:
            for name, held in owner.holds.items():
                if held is None:
                    await owner.load(name, dice.choice(SOURCES))
                elif not await owner.ask(name):
                    tally.bad(f"{name} does not answer at the end")
        for owner in owners:
            for name in owner.holds:
                await owner.unload(name)
        left = (await http.get("/admin/adapters")).json()
        tally.counts |= Counter({f"wished: {k}": n for k, n in weather.wished.items()})
        tally.counts["sets loaded by the engine"] = left["engine"]["loads"]
        tally.counts["sets evicted"] = left["engine"]["evictions"]
        if left["adapters"] or left["engine"]["taken"]:
            tally.bad(f"something is left at the end: {left}")
    if text := broken(file):
        tally.bad(f"the worker's slots: {text}")
    return tally


async def _tell(tally: Tally, until: float) -> None:
    while True:
        await asyncio.sleep(60)
        left = max(0.0, until - time.monotonic()) / 60
        print(f"{time.strftime('%H:%M:%S')} {dict(tally.counts)}, worst {tally.worst:.1e}, "
              f"{left:.0f} minutes left", file=sys.stderr, flush=True)  # fmt: skip


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.load_soak", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=120, help="how long (default 120)")
    parser.add_argument("--slots", type=int, default=1, help="of the engine (default 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file for the figures, JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="coxswain-load-soak-") as text:
        folder = Path(text)
        make_models(folder)
        folders = make_adapters(folder / "adapters", folder)
        config = configuration(folder, folder / "state", max_loaded=args.slots)
        del config["streams"], config["profiles"]
        (folder / "wish").mkdir()
        file = folder / "wish" / "wish.json"
        environ = {FILE: str(file), TIMEOUT: str(TIMEOUT_S)}
        prefix = (sys.executable, "-m", "tests.faulty")
        server = Server(folder, config, environ=environ, prefix=prefix)
        try:
            server.wait_ready()
            begin = time.time()
            oracle = Oracle(folder, folders)
            tally = asyncio.run(soak(server, folders, oracle, file, args.seed, args.minutes))
            if server.process.poll() is not None:
                tally.bad(f"the server ended: {server.log.read_text()[-2000:]}")
        finally:
            server.stop()
    found = {"minutes": (time.time() - begin) / 60, "slots": args.slots, "seed": args.seed,
             "machine": machine(), "counts": dict(sorted(tally.counts.items())),
             "largest_error": tally.worst, "wrong": tally.wrong}  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
