"""How long a server takes to its first token, stage by stage: `python -m load_tests.start_bench`.

The first start fills the registry and is not counted; the others are restarts. Times are those at
which the server's own log names its stages.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from load_tests.with_server import STOP_TIMEOUT_S, free_port

PYTHON = "Python, until the port is open"
FIRST = "the first token of a request"
END = "SIGTERM to the end"


def stage(line: str) -> str | None:
    """The stage that a line of the log begins; None: it says something else."""
    text = line.strip().removeprefix("coxswain: ")
    if text == line.strip() or " … " not in text:
        return None
    name = text.split(" … ")[0]
    # These two name what they load.
    return name.split(":")[0]


def start(config: Path, state: str) -> dict[str, float]:
    """Starts a server, asks it for a token and ends it.

    Args:
        config: its configuration.
        state: folder of its registry.

    Returns:
        Seconds by stage, in order; the first token's and the end's last.

    Raises:
        RuntimeError: it ended before it was ready.
    """
    command = [sys.executable, "-m", "server.main", "serve", str(config)]
    command += ["--port", str(free_port())]
    begun = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, "XDG_STATE_HOME": state}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    seconds: dict[str, float] = {}
    now, since = PYTHON, begun
    for line in process.stderr:
        if (new := stage(line)) is not None and new != now:
            seconds[now] = seconds.get(now, 0.0) + time.monotonic() - since
            now, since = new, time.monotonic()
        if line.startswith("  try "):
            break
    else:
        raise RuntimeError(f"the server ended with {process.wait()}")
    seconds[now] = seconds.get(now, 0.0) + time.monotonic() - since
    seconds[FIRST] = first_token(line)
    since = time.monotonic()
    process.terminate()
    process.communicate(timeout=STOP_TIMEOUT_S)
    return {**seconds, END: time.monotonic() - since}


def first_token(line: str) -> float:
    """Seconds from the request that the server tells one to try to its first token."""
    words = shlex.split(line)
    url, body = words[2], json.loads(words[-1]) | {"stream": True}
    begun = time.monotonic()
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        answer.raise_for_status()
        for event in answer.iter_lines():
            if event.startswith("data: {"):
                choice = json.loads(event.removeprefix("data: "))["choices"][0]
                if choice.get("text") or choice.get("delta", {}).get("content"):
                    break
    return time.monotonic() - begun


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.start_bench", description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", default=Path("zoo/server.yaml"))
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        start(given.config, state)
        runs = [start(given.config, state) for _ in range(given.runs)]
    ready = [sum(s for name, s in run.items() if name not in (FIRST, END)) for run in runs]
    totals = [whole + run[FIRST] for whole, run in zip(ready, runs, strict=True)]
    print(f"| stage | seconds, {given.runs} restarts |")
    print("|---|---|")
    for name in runs[0]:
        print(f"| {name} | {shown([run.get(name, 0.0) for run in runs])} |")
    print(f"| start to `/ready` | {shown(ready)} |")
    print(f"| start to the first token | {shown(totals)} |")
    return 0


def shown(values: list[float]) -> str:
    """The median, and from where to where."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
