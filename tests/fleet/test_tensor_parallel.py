"""Two ranks of one engine on one machine: base, companions and adapters are all split.

`test_two_ranks.py` tries the rest without the HTTP server.
"""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.adapters import kinds
from tests.fleet.asking import ADAPTED, STEERED, TOLD, ask_all
from tests.server.adapting.expected import Kind, Oracle
from tests.server.adapting.kit import configuration, load, serving
from tests.server.live import Server

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]


OTHERS = {
    "offset": kinds.lora(lora_bias=True),
    "scaled": kinds.ia3(["k_proj", "o_proj", "gate_proj"], []),
    "dora": kinds.lora(use_dora=True),
}
"""Constants, which one rank adds where the ranks' outputs are summed; factors of such sums; and
norms of rows that lie on several ranks."""


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
        for name in ("a", "b", "pack"):
            load(server, name, folders[name])
        for i, (name, lora) in enumerate(OTHERS.items()):
            folder = models / "adapters" / name
            folders[name] = kinds.make(kinds.Case(name, lora), folder, models / "base", 70 + i)
            load(server, name, folders[name])
        adapted = [*ADAPTED, *(Kind(((name, 1.0, None, None),)) for name in OTHERS)]
        adapted.append(Kind((("offset", 0.7, None, None), ("scaled", 0.5, None, None))))
        found = ask_all(server.url, oracle, [*STEERED, *adapted], rounds=4)
        told = server.post("/v1/completions", TOLD).json()["steering"]["choices"][0]
    assert len(told["token_details"]) == 6
    for entry in told["token_details"]:
        assert entry["stream_choices"].keys() == {"base", "chat", "plain"}
        assert entry["stream_choices"]["base"]["token_id"] == entry["base_choice_id"]
    print(
        f"\ntensor parallel 2: {found.answers} answers, steered, adapted and plain, "
        f"largest error {found.error:.1e} nats, {found.seconds:.1f} s"
    )
