"""What streams with heads cost: value-augmented sampling as k grows, and collaborative decoding.

    python -m load_tests.head_bench                 # the tables, about twenty minutes on 2 cores
    python -m load_tests.head_bench --out result.json

Milliseconds of one decode step as in `load_tests.step_bench`, from which the models come too; the
value model is a tenth of the base. Three ways to evaluate k candidates are timed:

- the engine's: one batch of k rows for each request;
- the same engine with one candidate of each request at a time, k passes;
- the authors' way, as their release does it (arXiv 2405.06639, `topk_per_device_batch_size` 1),
  written again from its description with `transformers`: one request, k passes over a KV cache that
  is cut back after each. Its ratio is to a step of the base in the same loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.rounds import spread
from load_tests.shapes import BASE, COMPANION, write_model
from load_tests.step_bench import PROMPT_TOKENS, WARM_STEPS, engine_args, step_ms

CANDIDATES = (1, 5, 20, 50)
ROWS = (1, 16)
AUTHORS_STEPS = 12


def write_heads(folder: Path) -> None:
    """The models of the bench: random heads beside configurations without weights."""
    import torch
    from safetensors.torch import save_file

    for name, shape in (("base", BASE), ("value", COMPANION)):
        write_model(folder / name, shape)
    head = {"v_head.summary.weight": torch.randn(1, COMPANION["hidden_size"])}
    save_file(head, folder / "value" / "v_head.safetensors")
    (folder / "critic").mkdir()
    save_file({"weight": torch.randn(1, BASE["hidden_size"])}, folder / "critic" / "m.safetensors")


def plain(folder: Path, model: str) -> dict[str, float]:
    """Rows → milliseconds per step of a model served alone by vLLM."""
    args = engine_args()
    from vllm import LLM

    llm = LLM(model=str(folder / model), **args)
    return {f"{n}": step_ms(llm, n, 0, {}) for n in ROWS}


def values(folder: Path) -> dict[str, float]:
    """'rows/k' → milliseconds per step, and 'rows/k passes' with one candidate at a time."""
    args = engine_args()
    from vllm import LLM

    from steering.engine_args import StreamSource, steered_engine_args
    from steering.plan import SteeringPlan, Values
    from steering.wire import SteeringPayload, pack

    streams = {"value": StreamSource(str(folder / "value"), head="value")}
    llm = LLM(**steered_engine_args(str(folder / "base"), streams, **args))
    llm.collective_rpc("coxswain_bind")
    worker: Any = llm.llm_engine.model_executor
    step = worker.driver_worker.worker.model_runner.get_model()._step
    together = step.values
    found = {}
    for n in ROWS:
        for k in CANDIDATES:
            plan = SteeringPlan("value_augmented", values=Values((("value", 2.0),), k))
            payload = pack(SteeringPayload(replace(plan, bodies=("value",))))
            found[f"{n}/{k}"] = step_ms(llm, n, n, payload)
            step.values = replace(together, chunk=n)
            found[f"{n}/{k} passes"] = step_ms(llm, n, n, payload)
            step.values = together
    return found


def critical(folder: Path) -> dict[str, float]:
    """Rows → milliseconds per step with a pretrained model of the base's size and a probe."""
    args = engine_args()
    from vllm import LLM

    from steering.engine_args import StreamSource, steered_engine_args
    from steering.plan import Ender, Gate, Rule, RuleKind, SteeringPlan
    from steering.wire import SteeringPayload, pack

    streams = {
        "pretrained": StreamSource(str(folder / "base")),
        "critic": StreamSource(head="classifier", on="base", path=str(folder / "critic")),
    }
    llm = LLM(**steered_engine_args(str(folder / "base"), streams, **args))
    llm.collective_rpc("coxswain_bind")
    rule = Rule(
        RuleKind.SELECT, "pretrained", 0.5, "critic",
        gate=Gate.HEAD, hard=True, ender=Ender.SUM, best=True,
    )  # fmt: skip
    weights = (("base", 1.0), ("pretrained", 1.0))
    payload = pack(SteeringPayload(SteeringPlan("critical_tokens", weights, rule)))
    return {f"{n}": step_ms(llm, n, n, payload) for n in ROWS}


def authors(folder: Path) -> dict[str, float]:
    """By k: milliseconds per step of the authors' loop; 'base': of the base in the same loop."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    def model(name: str) -> Any:
        config = AutoConfig.from_pretrained(folder / name)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    base, value = model("base"), model("value")
    head = torch.randn(COMPANION["hidden_size"], dtype=torch.bfloat16)
    prompt = torch.arange(5, 5 + PROMPT_TOKENS)[None]

    @torch.inference_mode()
    def loop(k: int) -> float:
        caches = DynamicCache(), DynamicCache()
        ids, times = prompt, []
        for _ in range(WARM_STEPS + AUTHORS_STEPS):
            begin = time.perf_counter()
            scores = base(ids, past_key_values=caches[0]).logits[0, -1].float()
            if k:
                value.model(ids, past_key_values=caches[1])
                found = []
                for candidate in (best := scores.topk(k)).indices:
                    row = candidate[None, None]
                    out = value.model(row, past_key_values=caches[1]).last_hidden_state[0, -1]
                    found.append(float(out @ head))
                    caches[1].crop(-1)
                after = torch.tensor(found)
                scores[best.indices] += 2.0 * (after - after.mean())
            ids = scores.argmax()[None, None]
            times.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(times[WARM_STEPS:])

    return {"base": loop(0)} | {f"{k}": loop(k) for k in CANDIDATES}


PARTS = {"values": values, "critical": critical, "authors": authors}


def run(part: str, folder: Path) -> dict[str, float]:
    """A part in a process of its own: of `PARTS`, or a model's name."""
    print(f"  {part} …", file=sys.stderr)
    command = [sys.executable, "-m", "load_tests.head_bench", "--part", part, "--folder"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{part} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


Round = dict[str, dict[str, float]]


def values_table(rounds: list[Round]) -> str:
    """Markdown: a step with values over a step of the base alone."""
    names = [f"engine, rows: {n}" for n in ROWS] + [f"k passes, rows: {n}" for n in ROWS]
    lines = ["| k | " + " | ".join([*names, "authors' way, rows: 1"]) + " |", "|---" * 6 + "|"]
    for k in CANDIDATES:
        cells = [f"{k}"]
        for kind in ("", " passes"):
            for n in ROWS:
                key = f"{n}/{k}{kind}"
                cells.append(spread([r["values"][key] / r["base"][f"{n}"] for r in rounds]))
        cells.append(spread([r["authors"][f"{k}"] / r["authors"]["base"] for r in rounds]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def critical_table(rounds: list[Round]) -> str:
    """Markdown: a collaborative step over both models' steps alone."""
    lines = ["| rows | base alone, ms | collaborative, ms | over the two alone |", "|---" * 4 + "|"]
    for n in ROWS:
        alone = [r["base"][f"{n}"] for r in rounds]
        both = [r["critical"][f"{n}"] for r in rounds]
        ratio = spread([b / (2 * a) for a, b in zip(alone, both, strict=True)])
        mean = f"{statistics.median(alone):.1f} | {statistics.median(both):.1f}"
        lines.append(f"| {n} | {mean} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often to repeat (default 3)")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part = PARTS.get(args.part)
        print(json.dumps(part(args.folder) if part else plain(args.folder, args.part)))
        return
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as tmp:
        write_heads(Path(tmp))
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
            rounds.append({part: run(part, Path(tmp)) for part in ("base", *PARTS)})
    print(f"{values_table(rounds)}\n\n{critical_table(rounds)}")
    if args.out:
        args.out.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
