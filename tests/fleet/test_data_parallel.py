"""Two engines behind one server on one machine: vLLM shares the requests out between them."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.fleet.asking import ADAPTED, STEERED, TOLD, ask_all
from tests.server.adapting.expected import Oracle
from tests.server.adapting.kit import configuration, load, serving
from tests.server.live import Server
from tests.server.reading import last_line

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]


def engines(server: Server) -> list[psutil.Process]:
    """The processes of the engines."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "EngineCore" in child.name()]


def shares(server: Server) -> list[float]:
    """Tokens that each engine has drawn."""
    text = server.get("/metrics").text
    found = re.findall(r'^vllm:generation_tokens_total\{engine="(\d)".*\} (\S+)$', text, re.M)
    return [float(count) for _, count in sorted(found)]


def passes(server: Server) -> float:
    """Passes of the base, all engines together."""
    text = server.get("/metrics").text
    (found,) = re.findall(r'^coxswain_stream_passes_total\{stream="base"\} (\S+)$', text, re.M)
    return float(found)


def test_two_engines_answer_as_transformers_does(
    models: Path, folders: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    config = configuration(models, tmp_path)
    config["engine"]["data_parallel_size"] = 2
    server = Server(models, config, environ={"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    with serving(server):
        assert len(engines(server)) == 2
        for name in ("a", "b", "pack"):
            load(server, name, folders[name])
        found = ask_all(server.url, oracle, [*STEERED, *ADAPTED], rounds=6)
        each = shares(server)
        assert len(each) == 2 and min(each) > 0.2 * sum(each), each
        # Whichever engine it was, its report is found.
        for _ in range(6):
            told = server.post("/v1/completions", TOLD).json()["steering"]["choices"][0]
            assert len(told["token_details"]) == 6
        assert passes(server) > 0
        print(
            f"\ndata parallel 2: {found.answers} answers, steered, adapted and plain, tokens "
            f"{each}, largest error {found.error:.1e} nats, {found.seconds:.1f} s"
        )
        os.kill(engines(server)[1].pid, signal.SIGKILL)
        assert server.process.wait(60) == 1
    assert "engine failure" in last_line(server)
