"""Two ranks of one engine on one machine: base, companions and adapters are all split."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.fleet.asking import ADAPTED, STEERED, ask_all
from tests.server.adapting.expected import Oracle
from tests.server.adapting.kit import configuration, load_all, serving
from tests.server.live import Server

pytestmark = [pytest.mark.fleet, pytest.mark.engine, pytest.mark.timeout(900)]


def test_two_ranks_answer_as_transformers_does(
    models: Path, folders: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    config = configuration(models, tmp_path)
    config["engine"]["tensor_parallel_size"] = 2
    # vLLM's rank 0 on the first core, rank 1 on the second.
    server = Server(models, config, environ={"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    with serving(server):
        workers = [
            child.name()
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "Worker" in child.name()
        ]
        assert len(workers) == 2, workers
        load_all(server, folders)
        load = ask_all(server.url, oracle, [*STEERED, *ADAPTED], rounds=4)
    print(
        f"\ntensor parallel 2: {load.answers} answers, steered, adapted and plain, "
        f"largest error {load.error:.1e} nats, {load.seconds:.1f} s"
    )
