"""What a steered decode step costs, beside its streams served alone by vLLM.

    python -m load_tests.step_bench                 # the table, about ten minutes on 2 cores
    python -m load_tests.step_bench --out result.json

Every figure is the median milliseconds of one decode step. Each engine runs in a process of its
own, one after the other, and the whole round is repeated, because machines drift: a ratio is
taken within a round, and the table shows the median ratio over the rounds. Weights are random;
only the time matters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = {"hidden_size": 1024, "num_hidden_layers": 14, "heads": 16, "intermediate_size": 2816}
COMPANION = {"hidden_size": 256, "num_hidden_layers": 6, "heads": 4, "intermediate_size": 704}
VOCAB = 32_000
PROMPT_TOKENS, WARM_STEPS, STEPS = 64, 8, 48


def write_model(folder: Path, shape: dict[str, int], vocabulary: int = VOCAB) -> None:
    """A Llama configuration without weights (vLLM's dummy loader fills them)."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["num_hidden_layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


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


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Decode-step times of one engine, in this process.

    Args:
        job: {"model", "streams": {name: model}, "batches": {label: [rows, steered rows]}};
            streams absent means plain vLLM.

    Returns:
        label → median milliseconds per step.
    """
    engine = engine_args()
    from steering.plan import SteeringPlan
    from steering.wire import Freight, pack

    streams = job.get("streams", {})
    llm = start(job["model"], streams, engine)
    weights = (("base", 1.0), *zip(streams, (1.0, -1.0), strict=False))
    freight = pack(Freight(SteeringPlan("mix", weights)))
    return {
        label: step_ms(llm, rows, steered, freight)
        for label, (rows, steered) in job["batches"].items()
    }


def start(
    model: str, streams: dict[str, str], engine: dict[str, Any], one_product: bool = False
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


def step_ms(llm: Any, rows: int, steered: int, freight: dict[str, Any]) -> float:
    """Median milliseconds of a decode step.

    Args:
        llm: the engine.
        rows: requests that decode.
        steered: how many of them carry `freight`, the first ones.
        freight: what they carry.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    for row in range(rows):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=WARM_STEPS + STEPS,
            ignore_eos=True,
            detokenize=False,
            extra_args=freight if row < steered else None,
        )
        prompt = TokensPrompt(prompt_token_ids=[5 + row % 7 + i for i in range(PROMPT_TOKENS)])
        llm.llm_engine.add_request(str(row), prompt, params)
    times = []
    while llm.llm_engine.has_unfinished_requests():
        begin = time.perf_counter()
        llm.llm_engine.step()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[WARM_STEPS:-1])


def run(job: dict[str, Any], module: str = "load_tests.step_bench") -> Any:
    """What `--job` of a module prints, in a process of its own; here that is `measure`."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--job", json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"an engine failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one_round(folder: Path, sizes: list[int]) -> list[dict[str, float]]:
    """One line of figures per batch size, in milliseconds and ratios."""
    base, companion = str(folder / "base"), str(folder / "companion")
    alone = {f"{n}": [n, 0] for n in sorted({*sizes, *(max(1, n // 2) for n in sizes)})}
    print("  base alone …", file=sys.stderr)
    plain = run({"model": base, "batches": alone})
    print("  companion alone …", file=sys.stderr)
    small = run({"model": companion, "batches": alone})
    mixed: dict[str, list[int]] = {}
    for n in sizes:
        mixed |= {f"{n}/{n}": [n, n], f"{n}/0": [n, 0], f"{n}/half": [n, n // 2]}
    print("  base with two companions …", file=sys.stderr)
    steered = run(
        {"model": base, "streams": {"expert": companion, "anti": companion}, "batches": mixed}
    )
    lines = []
    for n in sizes:
        parts = plain[f"{n}"] + 2 * small[f"{n}"]
        line = {
            "rows": n,
            "base": plain[f"{n}"],
            "companion": small[f"{n}"],
            "steered": steered[f"{n}/{n}"],
            "steered / sum of streams": steered[f"{n}/{n}"] / parts,
            "unsteered": steered[f"{n}/0"],
            "unsteered throughput / plain": plain[f"{n}"] / steered[f"{n}/0"],
        }
        if n > 1:
            half = plain[f"{n}"] + 2 * small[f"{n // 2}"]
            line["half steered"] = steered[f"{n}/half"]
            line["half / (base + streams on half)"] = steered[f"{n}/half"] / half
        lines.append(line)
    return lines


def table(rounds: list[list[dict[str, float]]]) -> str:
    """A Markdown table of the medians over the rounds."""
    names = list(dict.fromkeys(name for line in rounds[0] for name in line))
    out = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for i, first in enumerate(rounds[0]):
        cells = []
        for name in names:
            values = [r[i][name] for r in rounds if name in r[i]]
            digits = 0 if name == "rows" else 2
            cells.append(f"{statistics.median(values):.{digits}f}" if name in first else "")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often to repeat (default 3)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="batch sizes")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return
    rounds = []
    with tempfile.TemporaryDirectory() as tmp:
        write_model(Path(tmp) / "base", BASE)
        write_model(Path(tmp) / "companion", COMPANION)
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
            rounds.append(one_round(Path(tmp), args.rows))
    print(table(rounds))
    if args.out:
        args.out.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
