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
from typing import Any

from load_tests.gpu_check.place import GPU
from load_tests.gpu_check.sections import Clock, Finding, Skipped

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

NAMES = ("base", "companion", "steered")
CLAIM = "steered / (base + 2 companions)"


def ratios(clock: Clock) -> Finding:
    """`load_tests.step_bench` in a short form: the figures, no judgement."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if GPU else "0"
    from load_tests.rounds import running
    from load_tests.shapes import BASE, COMPANION, write_model
    from load_tests.step_bench import kinds

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for name, shape in (("base", BASE), ("companion", COMPANION)):
            write_model(folder / name, shape)
        engine = {"engine": {"gpu_memory_utilization": 0.25}} if GPU else {}
        wanted = {name: kinds(folder)[name] | engine for name in NAMES}
        with running(wanted) as engines:
            if missing := [name for name in NAMES if name not in engines]:
                return Finding(False, f"did not start: {', '.join(missing)} (see the log)")
            measured = _measured(clock, engines)
    if not measured:
        return Finding(False, "no time was left once the engines had started")
    return Finding(True, summary(measured), {"rows": measured})


def _measured(clock: Clock, engines: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Rows → per round, the milliseconds of a decode step by column."""
    from load_tests.step_bench import decode_ms

    found: dict[str, list[dict[str, float]]] = {}
    sizes = (1, 16, 64) if GPU else (1,)
    # The first round warms up.
    for i, rows in clock.cases([(i, rows) for i in range(4 if GPU else 2) for rows in sizes]):
        one = {name: decode_ms(engines[name], rows, rows * (name == "steered")) for name in NAMES}
        one["unsteered"] = decode_ms(engines["steered"], rows, 0)
        if i:
            found.setdefault(str(rows), []).append(one)
    return found


def summary(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The ratio of each size: its median over the rounds."""
    parts = []
    for rows, rounds in measured.items():
        ratio = statistics.median(
            one["steered"] / (one["base"] + 2 * one["companion"]) for one in rounds
        )
        steered = statistics.median(one["steered"] for one in rounds)
        plain = statistics.median(one["unsteered"] / one["base"] for one in rounds)
        parts.append(f"{rows} rows {ratio:.2f} ({steered:.2f} ms, unsteered / base {plain:.2f})")
    return f"{CLAIM}: " + "; ".join(parts)
