"""What a steered decode step costs, beside its streams served alone by vLLM.

    python -m load_tests.step_bench                 # the table, about six minutes on 2 cores
    python -m load_tests.step_bench --out result.json

Every figure is the median milliseconds of one decode step. Each engine runs in a process of its
own; all stay up and are asked in turn, because machines drift: a ratio is taken within a round,
and the table shows the median ratio over the rounds. Weights are random; only the time matters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from load_tests.adapter_engine import STEERED
from load_tests.rounds import Engine, Round, Work, rounds, running, spread
from load_tests.shapes import BASE, COMPANION, write_model

PROMPT_TOKENS, WARM_STEPS, STEPS = 64, 8, 48


def engine_args() -> dict[str, Any]:
    """What all engines have in common; first in a process, for it sets its environment."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        GOMP_SPINCOUNT="20000",  # as the server sets it; for plain vLLM too
    )
    return {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "disable_log_stats": True,
    }


def start(
    model: str,
    streams: dict[str, str],
    engine: dict[str, Any],
    one_product: Sequence[Sequence[str]] = (),
) -> Any:
    """An engine: plain vLLM without streams.

    Args:
        model: folder of the base.
        streams: name → folder.
        one_product: as in `steered_engine_args`.
        engine: vLLM's arguments, from `engine_args`.
    """
    from vllm import LLM

    from steering.engine_args import StreamSource, steered_engine_args

    if not streams:
        return LLM(model=model, **engine)
    sources = {name: StreamSource(path) for name, path in streams.items()}
    llm = LLM(**steered_engine_args(model, sources, one_product=one_product, **engine))
    llm.collective_rpc("coxswain_bind")
    return llm


def step_ms(llm: Any, rows: int, steered: int, payload: dict[str, Any]) -> float:
    """Median milliseconds of a decode step.

    Args:
        llm: the engine.
        rows: requests that decode.
        steered: how many of them carry `payload`, the first ones.
        payload: what they carry.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    for row in range(rows):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=WARM_STEPS + STEPS,
            ignore_eos=True,
            detokenize=False,
            extra_args=payload if row < steered else None,
        )
        prompt = TokensPrompt(prompt_token_ids=[5 + row % 7 + i for i in range(PROMPT_TOKENS)])
        llm.llm_engine.add_request(str(row), prompt, params)
    times = []
    while llm.llm_engine.has_unfinished_requests():
        begin = time.perf_counter()
        llm.llm_engine.step()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[WARM_STEPS:-1])


def kinds(folder: Path) -> dict[str, dict[str, Any]]:
    """The engines: plain vLLM with either model, ours with the read-out either way, and the loop
    of the research code in `transformers`, equal prompts in a static batch.
    """
    common = {"sets": 0, "rank": 0, "adapters": {}}
    paths = {name: str(folder / name) for name in ("base", "companion")}
    streams = {"expert": paths["companion"], "anti": paths["companion"]}
    ours = {**common, "model": paths["base"], "ours": True, "streams": streams}
    return {
        "base": {**common, "model": paths["base"], "ours": False},
        "companion": {**common, "model": paths["companion"], "ours": False},
        "steered": ours,
        "one product": {**ours, "one_product": [list(streams)]},
        "loop": {"loop": [paths["base"], *streams.values()], "adapters": {}},
    }


def works(engines: Mapping[str, Engine], sizes: Sequence[int]) -> dict[str, Work]:
    """Rows → column → what measures it."""
    found: dict[str, Work] = {}
    for n in sizes:
        found[str(n)] = {
            "base": partial(decode_ms, engines["base"], n, 0),
            "companion": partial(decode_ms, engines["companion"], n, 0),
            "steered": partial(decode_ms, engines["steered"], n, n),
            "one product": partial(decode_ms, engines["one product"], n, n),
            "unsteered": partial(decode_ms, engines["steered"], n, 0),
            "loop": partial(decode_ms, engines["loop"], n, 0),
        }
        if n > 1:
            found[str(n)] |= {
                "half": partial(decode_ms, engines["steered"], n, n // 2),
                "companion, half": partial(decode_ms, engines["companion"], n // 2, 0),
            }
    return found


def decode_ms(engine: Engine, rows: int, steered: int) -> float:
    """Median milliseconds of a decode step, the first rows steered."""
    named = [STEERED] * steered + [None] * (rows - steered)
    drawn = WARM_STEPS + STEPS
    return float(engine.ask("serve", rows=named, prompt=PROMPT_TOKENS, drawn=drawn)["decode"])


def ratios(one: Mapping[str, float]) -> dict[str, float]:
    """The claims, of one size in one round."""
    alone = one["base"] + 2 * one["companion"]
    found = {
        "steered / sum of its streams": one["steered"] / alone,
        "in one product / sum": one["one product"] / alone,
        "times as fast as the transformers loop": one["loop"] / one["steered"],
        "unsteered throughput / plain vLLM": one["base"] / one["unsteered"],
    }
    if "half" in one:
        parts = one["base"] + 2 * one["companion, half"]
        found["half steered / (base + streams on half)"] = one["half"] / parts
    return found


def table(measured: Sequence[Round]) -> str:
    """A Markdown table: medians in milliseconds, then ratios with their range over the rounds."""
    times = ("base", "companion", "steered", "one product", "loop")
    claims = list(ratios(measured[0][max(measured[0], key=int)]))
    out = ["| rows | " + " | ".join([*(f"{t}, ms" for t in times), *claims]) + " |"]
    out.append("|---" * (1 + len(times) + len(claims)) + "|")
    for rows in measured[0]:
        cells = [f"{statistics.median(one[rows][name] for one in measured):.1f}" for name in times]
        for claim in claims:
            found = [r[claim] for one in measured if claim in (r := ratios(one[rows]))]
            cells.append(spread(found) if found else "")
        out.append("| " + " | ".join([rows, *cells]) + " |")
    return "\n".join(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often to repeat (default 5)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="batch sizes")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument(
        "--models", type=Path, help="keep the models here: vLLM then need not compile them again"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = args.models or Path(tmp)
        for name, shape in (("base", BASE), ("companion", COMPANION)):
            if not (folder / name).exists():
                write_model(folder / name, shape)
        with running(kinds(folder)) as engines:
            measured = rounds(args.rounds, works(engines, args.rows))
    print(table(measured))
    if args.out:
        args.out.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
