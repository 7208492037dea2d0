"""Sections G and H: steered engines of vLLM on Model Runner V2, with a graph per stream."""

from __future__ import annotations

import importlib.util
import logging
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from load_tests.gpu_check.place import GPU
from load_tests.gpu_check.sections import Clock, Finding, Skipped
from load_tests.shapes import (
    BASE,
    COMPANION,
    LLAMA_1B,
    LLAMA_3B,
    LLAMA_8B,
    LLAMA_VOCAB,
    VOCAB,
    gib,
    write_model,
)

ALLOWED = 1e-3 if GPU else 1e-4
"""Nats, float32 against `transformers` on the CPU."""

# --- G: exactness -------------------------------------------------------------------------------


def exactness(clock: Clock) -> Finding:
    """A tiny engine in float32: companions, a twin, own prompts, adapters, late and plain rows."""
    for name in ("peft", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise Skipped(f"{name} is not installed")
    # So that Triton's attention multiplies float32 as float32.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    if not GPU:
        from tests.emulated import triton_cpu

        triton_cpu.install()
    with tempfile.TemporaryDirectory() as folder, _graphed(), _said() as lines:
        return _exactness(Path(folder), clock, lines)


def _exactness(folder: Path, clock: Clock, lines: list[str]) -> Finding:
    from vllm.platforms import current_platform

    if GPU and not current_platform.is_cuda():
        raise Skipped("this vLLM is not built for CUDA")
    from steering.engine_args import adapter_engine_args
    from tests.adapters.make import make_lora, make_native
    from tests.engine.driver import Engine, logprobs, tokens
    from tests.models import VOCAB_SIZE

    more: dict[str, Any] = adapter_engine_args(3, 24)
    more |= {"gpu_memory_utilization": 0.3} if GPU else {}
    engine = Engine(
        folder,
        ("llama", VOCAB_SIZE),
        {"chat": ("qwen2", VOCAB_SIZE), "plain": ("qwen2", VOCAB_SIZE - 9), "twin": "base"},
        enforce_eager=False,
        block_size=16,
        max_num_seqs=8,
        max_model_len=128,
        kv_cache_memory_bytes=(64 if GPU else 8) << 20,
        **more,
    )
    base = engine.folders["base"]
    lora, pack = (
        make_lora(folder / "one", base, seed=1),
        make_native(folder / "pack", base, tasks=3, seed=10),
    )
    engine.load_adapters({"one": lora, "pack": pack})
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    step = worker.model_runner.get_model()._step
    if step.graphs is None:
        return Finding(False, "the engine captured no graphs", {"log": lines})
    worst, count, differ = 0.0, 0, 0
    for batch in clock.cases(_batches()):
        for output, case in zip(engine.run(batch), batch, strict=True):
            want = engine.reference(case)
            differ += tokens(output) != [own.token for own in want]
            for got, own in zip(logprobs(output), want, strict=True):
                error, count = abs(got - own.logprob), count + 1
                worst = error if not error <= worst else worst
    replays = {name: int(step.graphs.replays[i]) for i, name in enumerate(step.names)}
    unused = [name for name, number in replays.items() if not number]
    said = (
        f"{count} tokens, largest error {worst:.1e}, {differ} texts differ; replays "
        + ", ".join(f"{name} {number}" for name, number in replays.items())
    )
    memory = next((line for line in lines if line.startswith("graphs:")), "")
    data: dict[str, Any] = {"tokens": count, "worst": worst, "differ": differ, "allowed": ALLOWED}
    data |= {"replays": replays, "graphs": memory, "log": lines}
    data |= {"asynchronous": engine.llm.llm_engine.vllm_config.scheduler_config.async_scheduling}
    return Finding(worst <= ALLOWED and not differ and not unused, f"{said}; {memory}", data)


def _batches() -> list[list[Any]]:
    """Two mixed batches; in the second requests have adapters, of the first none has."""
    from tests.engine.driver import Case, Use

    def mix(**weights: float) -> dict[str, Any]:
        return {"method": "mix", "weights": {"base": 1.0, **weights}}

    own = {"twin": range(60, 73)}
    return [
        [
            Case(range(10, 30), mix(chat=1.5, plain=-1.0), max_tokens=8),
            Case(range(10, 40), max_tokens=8),
            Case(range(50, 90), mix(chat=1.0, twin=-0.5), own, max_tokens=8),
            Case(range(7, 20), mix(twin=0.7), {"twin": range(200, 221)}, max_tokens=5, arrives=2),
        ],
        [
            Case(range(10, 18), adapters=(Use("one"),), max_tokens=6),
            Case(range(10, 19), mix(chat=1.2), adapters=(Use("pack", top_k=2),), max_tokens=7),
            Case(
                range(50, 66),
                mix(plain=1.0, twin=-0.5),
                own,
                adapters=(Use("one", 0.7, stream="twin"), Use("pack", -0.5)),
                max_tokens=6,
            ),
            Case(range(30, 38), max_tokens=6, arrives=1),
        ],
    ]


@contextmanager
def _graphed() -> Iterator[None]:
    """Engines made inside capture graphs; without a GPU, emulated ones."""
    if GPU:
        yield
        return
    from tests.emulated.platform import like_cuda

    with like_cuda("NONE", (1, 4), asynchronous=True):
        yield


@contextmanager
def _said() -> Iterator[list[str]]:
    """What the worker logs inside."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("steering.worker"), Handler()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# --- H: ratios ----------------------------------------------------------------------------------

NAMES = ("steered", "base", "companion")
CLAIM = "steered / (base + 2 companions)"
KV_GIB = 3
"""Of an engine: 64 requests of some 120 tokens at Llama 3.1 8B's size, twice."""
SPARE_GIB = 4
"""For activations, graphs and vLLM itself."""


class Pair(NamedTuple):
    """A base and a companion with random weights."""

    name: str
    base: dict[str, int]
    companion: dict[str, int]
    vocabulary: int

    @property
    def gib(self) -> float:
        """What the steered engine takes, with two companions."""
        weights = gib(self.base, self.vocabulary) + 2 * gib(self.companion, self.vocabulary)
        return weights + KV_GIB + SPARE_GIB


PAIRS = (
    Pair("Llama 3.1 8B and 3.2 1B", LLAMA_8B, LLAMA_1B, LLAMA_VOCAB),
    Pair("Llama 3.2 3B and 1B", LLAMA_3B, LLAMA_1B, LLAMA_VOCAB),
    Pair("220 M and 21 M parameters", BASE, COMPANION, VOCAB),
)
"""The largest first."""


def fitting(memory_gib: float) -> Pair:
    """The largest pair that a device has room for, else the smallest."""
    return next((pair for pair in PAIRS if pair.gib <= memory_gib), PAIRS[-1])


def ratios(clock: Clock) -> Finding:
    """`load_tests.step_bench` in a short form: the figures, no judgement.

    One engine after the other, so that the largest pair fits; a GPU drifts little meanwhile.
    """
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if GPU else "0"
    from load_tests.rounds import running
    from load_tests.step_bench import kinds

    pair, engine = PAIRS[-1], {}
    if GPU:
        pair = fitting(torch.cuda.mem_get_info()[0] / 2**30)
        engine = {"engine": {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": KV_GIB << 30}}
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for name, shape in (("base", pair.base), ("companion", pair.companion)):
            write_model(folder / name, shape, pair.vocabulary)
        for name in clock.cases(NAMES):
            with running({name: kinds(folder)[name] | engine}) as engines:
                if name not in engines:
                    return Finding(False, f"{name} did not start (see the log)", {"rows": found})
                for column, times in _measured(engines[name], name).items():
                    found[column] = times
    data = {"models": pair.name, "rows": found}
    if missing := [name for name in NAMES if name not in found]:
        return Finding(False, f"{pair.name}: no time was left for {', '.join(missing)}", data)
    return Finding(True, f"{pair.name}: {summary(found)}", data)


def _measured(engine: Any, name: str) -> dict[str, dict[str, list[float]]]:
    """Column → rows → milliseconds of a decode step, per round."""
    from load_tests.step_bench import decode_ms

    found: dict[str, dict[str, list[float]]] = {}
    for i in range(4 if GPU else 2):
        for rows in (1, 16, 64) if GPU else (1,):
            for column in ("steered", "unsteered") if name == "steered" else (name,):
                taken = decode_ms(engine, rows, rows * (column == "steered"))
                times = found.setdefault(column, {}).setdefault(str(rows), [])
                # The first round warms up.
                times += [taken] * bool(i)
    return found


def summary(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The ratio of each size, of medians over the rounds."""
    parts = []
    for rows in found["steered"]:
        median = {column: statistics.median(times[rows]) for column, times in found.items()}
        ratio = median["steered"] / (median["base"] + 2 * median["companion"])
        plain = median["unsteered"] / median["base"]
        said = f"{median['steered']:.2f} ms, unsteered / base {plain:.2f}"
        parts.append(f"{rows} rows {ratio:.2f} ({said})")
    return f"{CLAIM}: " + "; ".join(parts)
