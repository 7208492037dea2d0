"""The last steps of a start: tokenizers of the streams, profiles, routes' parts, the greeting."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer
from vllm.exceptions import VLLMClientError

from adapters.thread import in_thread
from server import serving as parts
from server.adapting.loader import EngineLoader
from server.adapting.service import opened
from server.checks.adapters import Layers, targets
from server.checks.diagnosis import Diagnosis
from server.checks.doctor import snapshot
from server.checks.end_tokens import end_tokens
from server.console import as_json
from server.operation.listening import address
from server.operation.logs import OneRecord
from server.operation.rate_limits import RateLimits
from server.operation.state import ServerState
from server.pieces import shortened
from server.requests.own_prompts import Reader
from server.requests.profiles import Profiles
from server.serving import Serving
from server.settings.config import Config
from steering.plan import BASE

if TYPE_CHECKING:
    from server.loading import Loaded


def readers(config: Config, diagnosis: Diagnosis) -> dict[str, Reader]:
    """A tokenizer for each stream. Reads files: run in a thread."""
    by_stream: dict[str, Reader] = {}
    by_folder: dict[str, Any] = {}
    trusted = bool(config.engine.get("trust_remote_code", False))
    for name, fact in diagnosis.streams.items():
        folder = str(fact.checkpoint.folder)
        if folder not in by_folder:
            by_folder[folder] = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        tokenizer = by_folder[folder]
        by_stream[name] = Reader(
            tokenizer, fact.checkpoint.vocabulary, bool(tokenizer.chat_template)
        )
    return by_stream


def adapter_loader(config: Config, loaded: Loaded, layers: Layers) -> EngineLoader:
    """The way of adapters into the engine. Reads the models' headers: run in a thread."""
    section = config.adapters
    assert section is not None
    return EngineLoader(
        loaded.engine,
        targets(config, loaded.diagnosis, layers),
        slots=section.max_loaded,
        max_rank=section.max_rank,
        max_bytes=section.max_loaded_bytes,
        element_bytes=loaded.engine.model_config.dtype.itemsize,
    )


class _OrdinaryFaults(logging.Filter):
    """Keeps vLLM from logging a traceback for each bad value that a client sends, and for each
    tool call that a model breaks off.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """False for what the client sees anyway."""
        error = record.exc_info[1] if record.exc_info else None
        where = record.name.startswith(("vllm.entrypoints.openai.", "vllm.tool_parsers."))
        return not (where and isinstance(error, (VLLMClientError, ValueError)))


def quiet_logs() -> None:
    """Installs the filter in this process."""
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(_OrdinaryFaults())
        if handler.formatter is not None and not as_json():
            handler.setFormatter(OneRecord(handler.formatter))


async def assemble(
    config: Config,
    state: ServerState,
    loaded: Loaded,
    closing: AsyncExitStack,
    stage: Callable[[str], None],
    rates: RateLimits,
) -> Serving:
    """Binds the engine and builds what the routes use.

    Args:
        config: the settings.
        state: the server's phase.
        loaded: the engine, and what the checks found out.
        closing: closed before the engine ends.
        stage: called with what is under way.
        rates: what callers may take per minute.

    Raises:
        PreloadFailed: an adapter of the configuration cannot be served.
        RegistryAway: Redis does not answer.
    """
    diagnosis = loaded.diagnosis
    assert diagnosis.methods is not None
    quiet_logs()
    loaded.engine.limits = config.limits
    bound = await loaded.engine.bind()
    stream_readers = await in_thread(lambda: readers(config, diagnosis))
    streams = snapshot(config)
    profiles = Profiles(
        config.profiles,
        base_name=config.name,
        methods=diagnosis.methods,
        snapshot=streams,
        limits=config.steering.limits,
        aliases=config.aliases,
        vocabulary=diagnosis.streams[BASE].checkpoint.vocabulary,
        end_tokens=await in_thread(
            lambda: end_tokens(
                diagnosis, {n: reader.tokenizer for n, reader in stream_readers.items()}
            )
        ),
    )
    adapters = None
    if config.adapters is not None:
        loader = await in_thread(lambda: adapter_loader(config, loaded, bound["layers"]))
        loaded.engine.residency = loader.residency

        def reserved() -> frozenset[str]:
            return frozenset({config.name, *profiles, *config.aliases})

        adapters = await closing.enter_async_context(opened(config, loader, reserved, stage))
    descriptions = {name: fact.describe() for name, fact in diagnosis.streams.items()}
    return parts.build(
        config,
        state,
        loaded.engine,
        diagnosis.methods,
        profiles,
        streams,
        stream_readers,
        descriptions,
        adapters,
        rates,
    )


def announce(serving: Serving, ports: Sequence[int], seconds: float) -> str:
    """The lines that the server prints when it is ready.

    Args:
        serving: the parts.
        ports: those that were bound: the main one, and that of the administration, if it has one.
        seconds: the start took.
    """
    config, port = serving.config, ports[0]
    streams = ", ".join(name for name in serving.streams if name != BASE) or "(none)"
    profiles = ", ".join(serving.profiles) or "(none)"
    adapters = []
    if serving.adapters is not None:
        names = shortened(serving.adapters.names()) or "(none yet: `coxswain adapters --help`)"
        adapters = [f"  adapters  {names}"]
    where = address(config.server, port)
    return "\n".join(
        [
            f"coxswain: ready after {seconds:.1f} s",
            f"  base      {config.name}  ({config.model})",
            f"  streams   {streams}",
            f"  profiles  {profiles}",
            f"  methods   {', '.join(serving.methods)}",
            *adapters,
            *[f"  admin     {address(config.server, found, admin=True)}" for found in ports[1:]],
            *([f"  page      {where}/playground"] if config.playground else []),
            f"  try       {curl(serving, port)}",
        ]
    )


def curl(serving: Serving, port: int) -> str:
    """A request that works as it stands."""
    config = serving.config
    model = next(iter(serving.profiles), config.name)
    profile = serving.profiles.get(model)
    body: dict[str, Any] = {"model": model, "max_tokens": 32}
    if serving.has_template or (profile is not None and profile.chat_template):
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "completions", "Once upon a time"
    key = ' -H "Authorization: Bearer $COXSWAIN_API_KEY"' if config.auth.api_keys else ""
    where = address(config.server, port)
    if (uds := config.server.uds) is not None:
        where = f"--unix-socket {uds} http://localhost"
    return (
        f"curl {where}{config.server.root_path}/v1/{path} -H 'Content-Type: application/json'{key} "
        f"-d '{json.dumps(body)}'"
    )
