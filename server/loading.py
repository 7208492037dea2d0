"""Loads a configuration's models: environment, checks, engine. Imports vLLM only when called."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.checks.capacity import cpu_cache_bytes
from server.console import OnStage, say
from server.settings.config import Config
from server.settings.streams import StreamConfig
from steering.spec import MOST_STOPS
from steering.startup import Stage, listening

if TYPE_CHECKING:
    from server.checks.diagnosis import Diagnosis
    from server.engine_vllm import SteeredLLM
    from steering.engine_args import StreamSource


class StartFailed(Exception):
    """The server cannot start; one line per reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass
class Loaded:
    """The result of the loading thread."""

    engine: SteeredLLM
    diagnosis: Diagnosis


def environment(config: Config) -> list[str]:
    """Sets vLLM's environment, before it is imported; values that are set already win.

    Returns:
        What a person should know about it.
    """
    notes = []
    if runner := os.environ.get("VLLM_USE_V2_MODEL_RUNNER"):
        notes.append(f"model runner V{'2' if runner == '1' else '1'} (VLLM_USE_V2_MODEL_RUNNER)")
    quiet = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # Lets a CPU engine run its worker in the engine's own process:
        # docs/internals/decisions/0003.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # Choices per request, as in the OpenAI API; vLLM's own limit is 16384.
        "VLLM_MAX_N_SEQUENCES": "128",
        # Texts at which a reply may end; vLLM's own limit is 4, as OpenAI's.
        "VLLM_MAX_STOP_STRINGS": str(MOST_STOPS),
        # OpenMP threads that wait for each other spin a fifteenth of libgomp's default before they
        # sleep: where something else used the cores, some steps took 50 times as long.
        "GOMP_SPINCOUNT": "20000",
        # vLLM's linear layers keep their own compiled products; oneDNN's default, 1024 more, only
        # takes memory: docs/internals/decisions/0015.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # Noise of the processes that vLLM starts: its own deprecations, and the semaphores that
        # an immediate exit leaves to the operating system.
        "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker,"
        "ignore::FutureWarning:vllm.triton_utils.dispatcher",
    }
    if config.tracing is not None:
        # vLLM's own spans go the same way.
        quiet["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = config.tracing.protocol
        quiet["OTEL_SERVICE_NAME"] = config.tracing.service_name
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    return notes


def engine_arguments(config: Config, diagnosis: Diagnosis) -> dict[str, Any]:
    """Keyword arguments for vLLM's `AsyncEngineArgs`."""
    from vllm.platforms import current_platform

    from steering.engine_args import Speculation, adapter_engine_args, steered_engine_args

    engine = dict(config.engine)
    if config.tracing is not None:
        engine.setdefault("otlp_traces_endpoint", config.tracing.endpoint)
    # What vLLM's series and errors name the base: never its path.
    engine["served_model_name"] = config.name
    if config.chat.reasoning_parser is not None:
        # Grammars begin where the engine sees the end of the reasoning, as the front end does.
        engine["reasoning_parser"] = config.chat.reasoning_parser
    engine.setdefault("load_format", "safetensors")
    engine.setdefault("use_tqdm_on_load", False)
    if (cache := cpu_cache_bytes(config, diagnosis)) is not None:
        engine["kv_cache_memory_bytes"] = cache
    single = engine.get("tensor_parallel_size", 1) == 1
    if current_platform.is_cpu() and single:
        engine.setdefault("distributed_executor_backend", "uni")
    streams = {name: _source(name, s, diagnosis) for name, s in config.streams.items()}
    if config.adapters is not None:
        engine |= adapter_engine_args(config.adapters.max_loaded, config.adapters.max_rank)
    top_k, section = config.steering.max_top_k, config.steering.speculation
    speculation = None if section is None else Speculation(section.draft, section.tokens)
    return steered_engine_args(
        config.model,
        streams,
        diagnosis.overlaps,
        top_k,
        speculation,
        config.steering.one_product,
        config.adapters is not None and config.adapters.vectors,
        **engine,
    )


def _source(name: str, stream: StreamConfig, diagnosis: Diagnosis) -> StreamSource:
    from steering.engine_args import StreamSource

    head = None if stream.head == "q" else stream.head  # The worker runs it as a language model.
    model = stream.model
    if head is not None and model is not None:
        # The worker reads a head's tensors itself, so it needs the folder.
        model = str(diagnosis.streams[name].checkpoint.folder)
    norm = None if stream.layer is None else stream.norm is not False
    return StreamSource(model, stream.same_as, head, stream.on, stream.path, stream.layer, norm)


def check(config: Config, stage: Callable[[str], None]) -> Diagnosis:
    """Imports vLLM and checks the configuration. Blocks; runs in a thread.

    Args:
        config: the settings.
        stage: called with what is under way.

    Raises:
        StartFailed: with every reason.
    """
    stage("loading vLLM")
    from server.checks.doctor import diagnose

    stage("checking the configuration")
    diagnosis = diagnose(config)
    if diagnosis.problems:
        raise StartFailed(diagnosis.problems)
    return diagnosis


def load(config: Config, diagnosis: Diagnosis, stage: OnStage) -> Loaded:
    """Starts the engine. Blocks; runs in a thread.

    Args:
        config: the settings.
        diagnosis: without problems.
        stage: called with what is under way.

    Raises:
        StartFailed: with every reason.
    """
    from server.engine_vllm import start_engine

    # `/ready` shows this to everybody, so it names no stream.
    stage(f"loading models: {len(config.streams) + 1}")
    try:
        with listening(lambda found: _show(found, stage)):
            return Loaded(start_engine(engine_arguments(config, diagnosis)), diagnosis)
    except Exception as error:
        text = " ".join(str(error).split()).split(" Failed core proc(s)")[0]
        raise StartFailed([f"engine: {type(error).__name__}: {text[:600]}"]) from error


def _show(found: Stage, stage: OnStage) -> None:
    """Passes on what an engine does while it starts."""
    if found.doing == "compiled":
        say(f"coxswain: compiled {found.stream} in {found.seconds:.0f} s; kept for later starts")
        return
    where = f"{found.number} of {found.count}"
    stage(f"{found.doing} models: {where}", f"{found.doing} models: {found.stream}, {where}")
