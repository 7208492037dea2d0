"""What speculation gives, on the demo zoo: a base of many times the cost, a small stream drafts.

    python -m load_tests.speculation_bench               # the table, about four minutes on 2 cores
    python -m load_tests.speculation_bench --out result.json

The base is the zoo's, inflated: each of its layers is joined by many whose output projections are
zero. Such a layer adds nothing, so the function is the same at many times the cost. Steered as the
zoo's profile `chat`: expert `chat-small`, anti-expert `base-small`; the expert drafts. One question
at a time, greedy; all steered engines must give the same replies. Each engine runs in a process of
its own, all of them are alive and are asked in turn: ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from load_tests.rounds import spread

ZOO = Path(__file__).parents[1] / "zoo"
ANSWER = "answer: "
STREAMS = {"chat": "chat-small", "plain": "base-small"}
STRENGTH = 1.25
PLAIN, STEERED = "base alone", "steered"


def inflate(source: Path, target: Path, layers: int) -> None:
    """Writes a checkpoint of the same function with more layers.

    Args:
        source: a Llama checkpoint in one safetensors file.
        target: the new folder.
        layers: of the new model; the added ones get the weights of the last, and output
            projections of zero.
    """
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    first, config["num_hidden_layers"] = config["num_hidden_layers"], layers
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    last = f"model.layers.{first - 1}."
    for layer in range(first, layers):
        for name in [n for n in tensors if n.startswith(last)]:
            added = tensors[name].clone()
            if "o_proj" in name or "down_proj" in name:
                added.zero_()
            tensors[name.replace(last, f"model.layers.{layer}.")] = added
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


class Driven:
    """An engine in this process.

    Args:
        base: a checkpoint.
        streams: name → checkpoint; none: plain vLLM, also without drafts.
        weights: (name, weight) of the sum that is decoded.
        draft: the stream that drafts.
        drafts: per step; 0: no speculation.
        dtype: of all.
    """

    def __init__(
        self,
        base: str,
        dtype: str,
        streams: dict[str, str] | None = None,
        weights: Sequence[tuple[str, float]] = (),
        draft: str = "",
        drafts: int = 0,
    ) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_USE_V2_MODEL_RUNNER="0",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
            GOMP_SPINCOUNT="20000",
        )
        from vllm import LLM

        from steering.engine_args import Speculation, StreamSource, steered_engine_args

        engine: dict[str, Any] = {
            "dtype": dtype,
            "max_model_len": 512,
            "max_num_seqs": 4,
            "kv_cache_memory_bytes": 1 << 29,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "disable_log_stats": False,
            "enforce_eager": True,  # as the zoo's own server
        }
        self._weights = tuple((name, weight) for name, weight in weights)
        if not streams:
            self._llm = LLM(model=base, **engine)
            return
        sources = {name: StreamSource(folder) for name, folder in streams.items()}
        speculation = Speculation(draft, drafts) if drafts else None
        self._llm = LLM(**steered_engine_args(base, sources, speculation=speculation, **engine))
        self._llm.collective_rpc("coxswain_bind")

    def replies(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Greedy replies one after the other: their ids, and tokens per second while decoding.

        Args:
            prompts: token ids.
            tokens: of the longest reply.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        from steering.plan import SteeringPlan
        from steering.wire import SteeringPayload, pack

        extra = None
        if self._weights:
            extra = pack(SteeringPayload(SteeringPlan("mix", self._weights)))
        engine, found, decoded, seconds = self._llm.llm_engine, [], 0, 0.0
        for ids in prompts:
            params = SamplingParams(
                temperature=0.0, max_tokens=tokens, detokenize=False, extra_args=extra
            )
            engine.add_request("0", TokensPrompt(prompt_token_ids=ids), params)
            outputs = engine.step()  # the prompt, and the first token
            first = len(outputs[0].outputs[0].token_ids)
            begin = time.perf_counter()
            while engine.has_unfinished_requests():
                outputs = engine.step() or outputs
            seconds += time.perf_counter() - begin
            found.append(list(outputs[0].outputs[0].token_ids))
            decoded += len(found[-1]) - first
        return {"replies": found, "rate": decoded / seconds}

    def counts(self) -> dict[str, int]:
        """Drafts and accepted drafts since start, by vLLM's own series."""
        found = {m.name: getattr(m, "value", 0) for m in self._llm.get_metrics()}
        start = "vllm:spec_decode_num_"
        return {k: int(found.get(f"{start}{k}_tokens", 0)) for k in ("draft", "accepted")}


def serve(job: dict[str, Any]) -> None:
    """Answers calls on standard input until it ends."""
    driven = Driven(**job)
    print(ANSWER + "{}", flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        print(ANSWER + json.dumps(getattr(driven, call.pop("do"))(**call)), flush=True)


class Engine:
    """An engine in a process of its own.

    Args:
        job: see `Driven`.
    """

    def __init__(self, **job: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "load_tests.speculation_bench", "--job", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask()

    def ask(self, **call: Any) -> Any:
        """What a method of `Driven` returns."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if call:
            print(json.dumps(call), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"an engine ended with {self._process.wait()}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def prompts(count: int) -> list[list[int]]:
    """Held-out questions as the zoo's server renders them."""
    from transformers import AutoTokenizer

    from zoo.questions import read_questions

    chat = AutoTokenizer.from_pretrained(ZOO / "models" / "chat-small")
    found = []
    for question in read_questions(ZOO / "data" / "test.jsonl")[:count]:
        asked = [{"role": "user", "content": question.question}]
        text = chat.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        found.append(chat(text, add_special_tokens=False).input_ids)
    return found


def pass_ms(folder: Path, repeats: int = 30) -> float:
    """Median milliseconds of one-token passes of a checkpoint in `transformers`, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, times = torch.tensor([[5]]), []
    with torch.inference_mode():
        for _ in range(repeats):
            begin = time.perf_counter()
            model(ids)
            times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def one_round(engines: dict[str, Engine], asked: list[list[int]], tokens: int) -> dict[str, Any]:
    """Column → figures.

    Raises:
        RuntimeError: two steered engines give different replies.
    """
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        before = engine.ask(do="counts")
        found[name] = engine.ask(do="replies", prompts=asked, tokens=tokens)
        after = engine.ask(do="counts")
        found[name] |= {key: after[key] - before[key] for key in after}
        replies = found[name].pop("replies")
        if name == STEERED:
            expected = replies
        elif name != PLAIN and replies != expected:
            raise RuntimeError(f"{name} gives other replies than {STEERED}")
    return found


def table(rounds: list[dict[str, Any]]) -> str:
    """A Markdown table: medians over the rounds; ratios taken within a round, with their range."""
    lines = [
        "| engine | tokens/s | ÷ base alone | ÷ steered | accepted drafts |",
        "|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        rates = [one[name]["rate"] for one in rounds]
        ratios = [
            spread([one[name]["rate"] / one[other]["rate"] for one in rounds])
            for other in (PLAIN, STEERED)
        ]
        drafts, kept = (sum(one[name][key] for one in rounds) for key in ("draft", "accepted"))
        share = f"{kept / drafts:.0%}" if drafts else ""
        lines.append(
            f"| {name} | {statistics.median(rates):.1f} | {' | '.join(ratios)} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often to repeat (default 7)")
    parser.add_argument("--questions", type=int, default=30, help="per round (default 30)")
    parser.add_argument("--layers", type=int, default=64, help="of the inflated base (default 64)")
    parser.add_argument("--drafts", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        serve(json.loads(args.job))
        return
    steered = {
        "streams": {n: str(ZOO / "models" / m) for n, m in STREAMS.items()},
        "weights": [("base", 1.0), ("chat", STRENGTH), ("plain", -STRENGTH)],
        "draft": "chat",
    }
    kinds: dict[str, dict[str, Any]] = {PLAIN: {}, STEERED: steered}
    kinds |= {f"steered, {n} drafts": {**steered, "drafts": n} for n in args.drafts}
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as tmp:
        base = Path(tmp) / "base"
        inflate(ZOO / "models" / "base-large", base, args.layers)
        ratio = pass_ms(base) / pass_ms(ZOO / "models" / "chat-small")
        print(f"one-token pass, base to draft: {ratio:.0f} to 1", file=sys.stderr)
        try:
            for name, kind in kinds.items():
                print(f"starting: {name}", file=sys.stderr)
                engines[name] = Engine(base=str(base), dtype=args.dtype, **kind)
            asked = prompts(args.questions)
            one_round(engines, asked[:3], 48)
            rounds = []
            for i in range(args.rounds):
                print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
                rounds.append(one_round(engines, asked, 48))
        finally:
            for engine in engines.values():
                engine.close()
    print(table(rounds))
    if args.out:
        args.out.write_text(json.dumps({"pass ratio": ratio, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
