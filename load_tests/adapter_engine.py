"""One engine of `adapter_bench` or `growth`, in a process of its own: jobs in, times out.

A job is a line of JSON on standard input, its answer a line on standard output. Several engines
stay up at the same time and are asked in turn, so that a ratio compares times a second apart.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ANSWER = "answer "
"""Begins the lines that are answers; vLLM may print others."""

WARM_STEPS = 4

PIECE_S = 0.005
"""As in `server.engine_vllm`."""

STEERED = "steered"
"""The name of rows that use all streams of their engine, in place of an adapter's."""


class Driven:
    """An engine and the adapters that it can use.

    Args:
        kind: {"model": folder, "ours": bool, "sets": slots, 0 for an engine without adapters,
            "rank": of a slot, "adapters": {name: folder}, and optional: "streams": {name: folder}
            of companions, None for a twin, "taps": {name: layer} of the base, "steering": {name of
            rows: their steering object}, "one_product": sets of streams, "engine": vLLM's arguments
            over ours}.
    """

    def __init__(self, kind: dict[str, Any]) -> None:
        from vllm import LLM

        from steering.engine_args import (
            StreamSource,
            adapter_engine_args,
            steered_engine_args,
        )

        engine: dict[str, Any] = {
            "dtype": "bfloat16",
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 1024,
            "max_num_seqs": 128,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": 1 << 30,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
        }
        engine |= kind.get("engine", {})
        if kind["sets"]:
            engine |= adapter_engine_args(kind["sets"], kind["rank"])
        self._served = 0
        self._ours = kind["ours"]
        if self._ours:
            streams = {
                name: StreamSource(path) if path else StreamSource(same_as="base")
                for name, path in kind.get("streams", {}).items()
            }
            taps = kind.get("taps", {})
            streams |= {n: StreamSource(on="base", layer=k, norm=False) for n, k in taps.items()}
            engine["one_product"] = kind.get("one_product", [])
            self._llm = LLM(**steered_engine_args(kind["model"], streams, **engine))
            self._llm.collective_rpc("coxswain_bind")
        else:
            self._llm = LLM(model=kind["model"], **engine)
        use = self._set_request if self._ours else self._peft_request
        self._uses = {n: use(i, n, Path(f)) for i, (n, f) in enumerate(kind["adapters"].items())}
        if kind.get("streams"):
            self._uses[STEERED] = (None, self._mix(list(kind["streams"])))
        for name, spec in kind.get("steering", {}).items():
            self._uses[name] = (None, self._steering(spec, taps))

    def _mix(self, streams: list[str]) -> Any:
        from steering.plan import SteeringPlan
        from steering.wire import SteeringPayload, pack

        signs = itertools.cycle((1.0, -1.0))
        weights = (("base", 1.0), *zip(streams, signs, strict=False))
        return pack(SteeringPayload(SteeringPlan("mix", weights)))

    def _steering(self, spec: dict[str, Any], taps: Mapping[str, int]) -> Any:
        from steering.method import Limits, Snapshot
        from steering.plugins import discover
        from steering.resolve import resolve
        from steering.wire import SteeringPayload, pack

        known = Snapshot(
            {"base": "lm", **dict.fromkeys(taps, "lm")}, {}, dict.fromkeys(taps, "base")
        )
        found = resolve(spec, methods=discover(), snapshot=known, limits=Limits())
        return pack(SteeringPayload(found.plan))

    def _set_request(self, _: int, __: str, folder: Path) -> tuple[Any, Any]:
        from vllm.lora.request import LoRARequest

        from adapters.formats.inspect import inspect
        from load_tests.adapter_files import shapes
        from steering.adapters import ResolvedAdapter, adapt
        from steering.plan import SteeringPlan
        from steering.wire import SteeringPayload, pack

        artefact = inspect(folder, shapes(), max_rank=512)
        chosen = ResolvedAdapter(artefact, artefact.digest())
        plan, adapters = adapt(SteeringPlan("base"), [chosen], {"base": "base"})
        assert adapters is not None
        return LoRARequest(**adapters.lora_request()), pack(SteeringPayload(plan))

    def _peft_request(self, i: int, name: str, folder: Path) -> tuple[Any, Any]:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, i + 1, str(folder)), None

    # --- jobs -----------------------------------------------------------------------------------

    def load(self, names: Sequence[str]) -> list[float]:
        """Loads adapters into slots; milliseconds of each."""
        times = []
        for name in names:
            begin = time.perf_counter()
            assert self._llm.llm_engine.add_lora(self._uses[name][0])
            times.append(1e3 * (time.perf_counter() - begin))
        return times

    def serve(self, rows: Sequence[str | None], prompt: int, drawn: int) -> dict[str, float]:
        """Serves one request per row, all arriving at once.

        Args:
            rows: the adapter of each, None for none, or `STEERED`.
            prompt: tokens of every prompt; all prompts must fit in one step.
            drawn: tokens to draw for every row.

        Returns:
            Milliseconds of the first step ("prefill"), of the median other step ("decode"), of
            the longest other step ("longest"), and tokens drawn per second ("throughput").
        """
        for row, name in enumerate(rows):
            self._add(row, name, prompt, drawn)
        times = self._steps()
        # Asynchronous scheduling returns a step's tokens one call later.
        assert drawn <= len(times) <= drawn + 2
        found = {"prefill": 1e3 * times[0], "throughput": drawn * len(rows) / sum(times)}
        if drawn > WARM_STEPS:
            found["decode"] = 1e3 * statistics.median(times[WARM_STEPS:])
            found["longest"] = 1e3 * max(times[WARM_STEPS:])
        return found

    def _add(self, row: int, name: str | None, prompt: int, drawn: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        lora, payload = self._uses[name] if name else (None, None)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=drawn,
            ignore_eos=True,
            detokenize=False,
            extra_args=payload,
        )
        self._served += 1
        ids = [5 + (7919 * self._served + 31 * row + 17 * i) % 30_000 for i in range(prompt)]
        self._llm.llm_engine.add_request(
            str(self._served), TokensPrompt(prompt_token_ids=ids), params, lora_request=lora
        )

    def _steps(self) -> list[float]:
        times = []
        gc.collect()
        while self._llm.llm_engine.has_unfinished_requests():
            begin = time.perf_counter()
            self._llm.llm_engine.step()
            times.append(time.perf_counter() - begin)
        return times

    def stall(self, names: Sequence[str], rows: int, drawn: int, ahead: bool) -> dict[str, float]:
        """Loads adapters, one by one, while requests without any decode.

        Args:
            names: the adapters.
            rows: requests that decode.
            drawn: tokens that each draws; enough for all adapters to load meanwhile.
            ahead: whether files are read in pieces between steps, as the server does.

        Returns:
            Milliseconds between two tokens: the median where nothing was loaded in between
            ("step") and the longest where something was ("longest gap").
        """
        for row in range(rows):
            self._add(row, None, 32, drawn)
        waiting = [self._uses[name][0] for name in names]
        times: dict[bool, list[float]] = {False: [], True: []}
        step = 0
        while self._llm.llm_engine.has_unfinished_requests():
            begin = time.perf_counter()
            loading = bool(waiting) and step > WARM_STEPS and (ahead or step % 2 == 0)
            if loading and self._load_piece(waiting[0], ahead):
                waiting.pop(0)
            self._llm.llm_engine.step()
            times[loading].append(1e3 * (time.perf_counter() - begin))
            step += 1
        assert not waiting, "the requests ended before everything was loaded"
        return {"step": statistics.median(times[False][1:]), "longest gap": max(times[True])}

    def _load_piece(self, lora: Any, ahead: bool) -> bool:
        """Loads a set, or reads a piece of it; whether it is loaded."""
        if ahead:
            arguments = (lora.lora_path, PIECE_S)
            if not self._llm.collective_rpc("coxswain_read_ahead", args=arguments)[0]["done"]:
                return False
        assert self._llm.llm_engine.add_lora(lora)
        return True

    def read_out(self, rows: int, times: int = 20) -> float:
        """Median milliseconds of the base's own read-out of so many rows: its unembedding alone."""
        import torch

        worker: Any = self._llm.llm_engine.model_executor
        base = worker.driver_worker.worker.model_runner.get_model().base
        width = self._llm.llm_engine.model_config.get_hidden_size()
        hidden = torch.randn(rows, width, dtype=torch.bfloat16)
        found = []
        for _ in range(times):
            begin = time.perf_counter()
            base.compute_logits(hidden)
            found.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(found)

    def form(self, name: str | None) -> None:
        """Lets one of the authors' forms compute packs; None: our own kernels again."""
        from adapters.kernels import gated, operation
        from load_tests.meteora_forms import FORMS, adding
        from steering.worker.adapting import lora_seam

        def added(groups: Sequence[Any], *_: Any) -> operation.Added:
            return operation.Added(None, tuple(groups))

        vars(operation)["add_adapters"] = adding(FORMS[name]) if name else gated.add_adapters
        vars(lora_seam)["added"] = added if name else operation.added


class Loop:
    """The loop of the research code in an engine's place, with random weights.

    Args:
        kind: {"loop": folders of a base, an expert and an anti-expert}.
    """

    def __init__(self, kind: dict[str, Any]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from load_tests.sequential import SequentialModels

        models = [
            AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
            ).eval()
            for folder in kind["loop"]
        ]
        self._loop = SequentialModels(models, (1.0, 1.0, -1.0))

    def serve(self, rows: Sequence[None], prompt: int, drawn: int) -> dict[str, float]:
        """As `Driven.serve`, in one static batch of equal prompts: the loop's best case."""
        ids = [
            [5 + (31 * row + 17 * i) % 30_000 for i in range(prompt)] for row in range(len(rows))
        ]
        times, begin = [], time.perf_counter()
        for _ in self._loop.decode(ids, drawn):
            end = time.perf_counter()
            times.append(end - begin)
            begin = end
        return {"decode": 1e3 * statistics.median(times[WARM_STEPS:])}


def main() -> None:
    """Reads the engine's kind from the command line, then jobs {"do": method, …} until the end."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        GOMP_SPINCOUNT="20000",  # as the server sets it; for plain vLLM too
    )
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    kind = json.loads(sys.argv[1])
    driven = Loop(kind) if "loop" in kind else Driven(kind)
    print(ANSWER + "null", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        do: Callable[..., Any] = getattr(driven, job.pop("do"))
        print(ANSWER + json.dumps(do(**job)), flush=True)
    os._exit(0)  # vLLM's shutdown is slow, and nothing is left to save


if __name__ == "__main__":
    main()
