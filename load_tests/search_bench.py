"""What guided search costs beside as many separate samples, in one run.

    python -m load_tests.search_bench [URL] [--tokens 96] [--rounds 3]

Without a URL it starts a server with the zoo. Every row draws as many tokens for a reply: K replies
as a whole (`n`), or K blocks at a time. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from load_tests.with_server import running_server

K = 4
ZOO = Path(__file__).parents[1] / "zoo" / "server.yaml"
BODY: dict[str, Any] = {
    "model": "base", "prompt": "<|user|>How are you today?<|assistant|>", "temperature": 1.0,
    "ignore_eos": True,
}  # fmt: skip
VALUE = {"method": "guided_search", "k": K, "score": {"value": "terse"}}
RATIO = {"method": "guided_search", "k": K,
         "score": {"log_ratio": {"of": "chat", "to": "plain"}}}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    f"{K} separate samples (`n`)": {"n": K},
    f"best_of_n, n {K}": {"steering": {"method": "best_of_n", "n": K, "value": "terse"}},
    **{
        f"guided_search, k {K}, blocks of {m}, {name}": {
            "steering": {**spec, "block": {"tokens": m}}
        }
        for name, spec in (("a value", VALUE), ("a log-ratio", RATIO))
        for m in (32, 8)
    },
}


def seconds(url: str, more: dict[str, Any], tokens: int, clients: int) -> float:
    """How long some clients wait for one answer each, all at once."""

    def ask(seed: int) -> None:
        body = {**BODY, **more, "max_tokens": tokens, "seed": seed}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    return time.perf_counter() - begin


def table(url: str, tokens: int, rounds: int) -> str:
    """Drawn tokens per second: medians of rounds that take the rows in turn."""
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds + 1):
        for name, more in ROWS.items():
            for clients in (1, 4):
                found.setdefault((name, clients), []).append(seconds(url, more, tokens, clients))
    lines = ["| drawn tokens/s | 1 client | 4 clients |", "|---|---|---|"]
    for name in ROWS:
        rates = [
            clients * K * tokens / statistics.median(found[name, clients][1:])  # the first warms up
            for clients in (1, 4)
        ]
        lines.append(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in rates) + " |")
    return "\n".join(lines)


@contextlib.contextmanager
def _server(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with running_server(ZOO) as address:
        yield address


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("url", nargs="?", help="a server with the zoo; absent: one is started")
    parser.add_argument("--tokens", type=int, default=96, help="of each reply")
    parser.add_argument("--rounds", type=int, default=3, help="that count")
    options = parser.parse_args()
    with _server(options.url) as url:
        print(table(url, options.tokens, options.rounds))


if __name__ == "__main__":
    main()
