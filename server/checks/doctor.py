"""Checks a configuration before anything is loaded: each problem in one line.

`coxswain doctor` prints the findings; `coxswain serve` runs the same checks first and takes over
what they found out (vocabulary overlaps, sizes).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.checks.adapters import adapter_problems
from server.checks.capacity import contexts, memory, ranks_of
from server.checks.checkpoints import Checkpoint, Unusable, inspect
from server.checks.diagnosis import Diagnosis, StreamFacts, where
from server.checks.heads import check_heads, value_problems
from server.checks.one_product import one_product_problems
from server.checks.speculation import speculation_problems
from server.checks.templates import check_profile_templates, check_template
from server.operation.listening import tls_options
from server.settings.config import RESERVED_ENGINE, Config
from steering.errors import SteeringError
from steering.families import beside_hybrid, is_hybrid, stream_architecture
from steering.method import Snapshot
from steering.plan import BASE
from steering.plugins import Registry, discover
from steering.refused import refusals, refused_environment
from steering.resolve import check_profile
from steering.vocabulary import Overlap, Vocabulary, load_vocabulary, overlap


def snapshot(config: Config) -> Snapshot:
    """The streams as the methods see them."""
    heads = {name: stream.head or "lm" for name, stream in config.streams.items()}
    on = {name: stream.on for name, stream in config.streams.items() if stream.on is not None}
    return Snapshot({BASE: "lm", **heads}, on)


def diagnose(config: Config) -> Diagnosis:
    """All checks, in order; later ones are left out where an earlier one found no ground."""
    found = Diagnosis()
    found.problems += _not_yet(config)
    found.guard("plugins", lambda: _methods(config, found))
    found.problems += engine_problems(config.engine)
    found.problems += _parsers(config)
    if (template := config.chat.template) is not None:
        found.guard("chat.template", lambda: check_template(template, "chat.template"))
    try:
        tls_options(config.server.tls)
    except OSError as error:
        found.problems.append(str(error))
    for name, source, owns in _sources(config):
        found.guard(where(name), lambda n=name, s=source, o=owns: _stream(config, found, n, s, o))  # type: ignore[misc]
    if found.methods is not None:
        _profiles(config, found, found.methods)
    if BASE in found.streams:
        check_heads(config, found)
        _vocabularies(config, found)
        found.problems += value_problems(config, found)
        found.problems += speculation_problems(config, found)
        found.problems += one_product_problems(config, found)
        found.problems += _architectures(config, found)
        found.problems += _beside_hybrid(config, found)
        found.problems += contexts(config, found)
        found.problems += memory(config, found)
    if config.adapters is not None:
        found.problems += adapter_problems(config, config.adapters, found)
    return found


def _sources(config: Config) -> list[tuple[str, str, bool]]:
    """(stream, model, owns its weights) of the streams that run, base first."""
    found = [(BASE, config.model, True)]
    for name, stream in config.streams.items():
        if stream.model is not None:
            found.append((name, stream.model, True))
        elif stream.same_as is not None:
            other = config.streams.get(stream.same_as)
            found.append((name, config.model if other is None else other.model or config.model,
                          False))  # fmt: skip
    return found


def _not_yet(config: Config) -> list[str]:
    """Sections that the schema knows and this version does not serve."""
    found = []
    if config.registry is not None and config.adapters is None:
        found.append("registry: records adapters, and there is no section `adapters`")
    for name, stream in config.streams.items():
        if stream.same_as not in (None, BASE):
            found.append(f"streams.{name}.same_as: only `{BASE}` can be shared at present")
    return found


def _methods(config: Config, found: Diagnosis) -> None:
    found.methods = discover(config.plugins)


def engine_problems(engine: Mapping[str, Any]) -> list[str]:
    """Engine arguments that vLLM does not know, that are ours, or that cannot be served."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {f.name for f in dataclasses.fields(AsyncEngineArgs)}
    found = []
    for name in engine:
        if name in RESERVED_ENGINE:
            found.append(f"engine.{name}: not here: {RESERVED_ENGINE[name]}")
        elif name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found.append(f"engine.{name}: vLLM has no such engine argument{hint}")
    found += [f"engine.{name}: {sentence}" for name, sentence in refusals(engine)]
    found += refused_environment()
    return found


def _parsers(config: Config) -> list[str]:
    """Parsers that vLLM does not have: it would look for them after the weights are loaded."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    found = []
    for key, manager in (("tool_call_parser", ToolParserManager),
                         ("reasoning_parser", ReasoningParserManager)):  # fmt: skip
        name, known = getattr(config.chat, key), manager.list_registered()
        if name is not None and name not in known:
            found.append(f"chat.{key}: no such parser (got {name!r}); "
                         f"allowed: one of: {', '.join(known)}")  # fmt: skip
    return found


def _stream(config: Config, found: Diagnosis, name: str, source: str, owns: bool) -> None:
    point = inspect(source)
    if point.encoder_decoder:
        raise Unusable(f"{point.architecture} is encoder-decoder; streams are decoders alone")
    _served(config, name, point)
    kv_bytes = point.kv_bytes(str(config.engine.get("dtype", "auto")))
    shown = source if owns else f"same as {config.streams[name].same_as}"
    found.streams[name] = StreamFacts(name, shown, point, point.vocabulary, kv_bytes, owns)


def _served(config: Config, name: str, point: Checkpoint) -> None:
    """Raises Unusable for a checkpoint that vLLM or the streams cannot run."""
    from vllm.transformers_utils.config import get_config

    body = name in config.streams and config.streams[name].head not in (None, "q")
    trust = bool(config.engine.get("trust_remote_code", False))
    try:
        stream_architecture(
            get_config(str(point.folder), trust),
            base=name not in config.streams,
            body=body,
            engine=config.engine,
        )
    except SteeringError as error:
        raise Unusable(str(error)) from error


def _beside_hybrid(config: Config, found: Diagnosis) -> list[str]:
    """What a base whose layers keep a state cannot do."""
    architecture = found.streams[BASE].checkpoint.architecture
    if not is_hybrid(architecture):
        return []
    refused = beside_hybrid(
        architecture,
        twins=[name for name, stream in config.streams.items() if stream.same_as is not None],
        speculates=config.steering.speculation is not None,
        engine={**config.engine, "enable_lora": config.adapters is not None},
    )
    return [f"{where(BASE)}: {line}" for line in refused]


def _profiles(config: Config, found: Diagnosis, methods: Registry) -> None:
    for name, profile in config.profiles.items():
        found.guard(
            f"profiles.{name}",
            lambda n=name, p=profile: _check_profile(config, methods, n, p),  # type: ignore[misc]
        )


def _check_profile(config: Config, methods: Registry, name: str, profile: Any) -> None:
    resolved = check_profile(
        name, profile, methods=methods, snapshot=snapshot(config), limits=config.steering.limits
    )
    check_profile_templates(name, profile, resolved)


def _vocabularies(config: Config, found: Diagnosis) -> None:
    """Compares each stream's tokens with the base's; the base's own tell its table's padding."""
    loaded: dict[Path, Vocabulary] = {}
    for name in list(found.streams):
        found.guard(where(name), lambda n=name: _overlap(found, n, loaded))  # type: ignore[misc]
        if not loaded:
            return


def _overlap(found: Diagnosis, name: str, loaded: dict[Path, Vocabulary]) -> None:
    fact = found.streams[name]
    for folder in (found.streams[BASE].checkpoint.folder, fact.checkpoint.folder):
        if folder not in loaded:
            loaded[folder] = load_vocabulary(str(folder))
    base = loaded[found.streams[BASE].checkpoint.folder]
    laid: Overlap = overlap(base, loaded[fact.checkpoint.folder], name=name)
    found.overlaps[name] = laid.to_wire()
    found.streams[name] = dataclasses.replace(fact, shared=int(laid.shared.sum()))


def _architectures(config: Config, found: Diagnosis) -> list[str]:
    """What vLLM and its attention backend can run."""
    from vllm.platforms import current_platform

    sizes: list[int] | None = None
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
    lines = []
    for name, fact in found.streams.items():
        if not fact.owns_weights:
            continue
        heads, ranks = fact.checkpoint.heads, ranks_of(config)
        if heads % ranks:
            lines.append(f"{where(name)}: {heads} attention heads cannot be split over "
                         f"engine.tensor_parallel_size: {ranks}")  # fmt: skip
        size = fact.checkpoint.head_size
        if sizes is not None and size and size not in sizes:
            allowed = ", ".join(map(str, sizes))
            lines.append(f"{where(name)}: attention heads of size {size}; the CPU backend has "
                         f"{allowed}")  # fmt: skip
    return lines
