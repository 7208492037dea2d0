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
from server.checks.taps import tap_problems
from server.checks.templates import check_profile_templates, check_template
from server.operation.listening import tls_options
from server.settings.config import RESERVED_ENGINE, Config
from steering.errors import BadValue, SteeringError
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
    taps = {name: of for name, of in on.items() if config.streams[name].layer is not None}
    bodies = {name: of for name, of in on.items() if name not in taps}
    return Snapshot({BASE: "lm", **heads}, bodies, taps)


def diagnose(config: Config) -> Diagnosis:
    """All checks, in order; later ones are left out where an earlier one found no ground."""
    diagnosis = Diagnosis()
    diagnosis.problems += _not_yet(config)
    diagnosis.guard("plugins", lambda: _methods(config, diagnosis))
    diagnosis.problems += engine_problems(config.engine)
    diagnosis.problems += _parsers(config)
    if (template := config.chat.template) is not None:
        diagnosis.guard("chat.template", lambda: check_template(template, "chat.template"))
    try:
        tls_options(config.server.tls)
    except OSError as error:
        diagnosis.problems.append(str(error))
    for name, source, owns in _sources(config):
        diagnosis.guard(
            where(name),
            lambda n=name, s=source, o=owns: _stream(config, diagnosis, n, s, o),  # type: ignore[misc]
        )
    if diagnosis.methods is not None:
        _profiles(config, diagnosis, diagnosis.methods)
    if BASE in diagnosis.streams:
        check_heads(config, diagnosis)
        diagnosis.problems += tap_problems(config, diagnosis)
        _vocabularies(config, diagnosis)
        diagnosis.problems += value_problems(config, diagnosis)
        diagnosis.problems += speculation_problems(config, diagnosis)
        diagnosis.problems += one_product_problems(config, diagnosis)
        diagnosis.problems += _architectures(config, diagnosis)
        diagnosis.problems += _beside_hybrid(config, diagnosis)
        diagnosis.problems += contexts(config, diagnosis)
        diagnosis.problems += memory(config, diagnosis)
    if config.adapters is not None:
        diagnosis.problems += adapter_problems(config, config.adapters, diagnosis)
    return diagnosis


def _sources(config: Config) -> list[tuple[str, str, bool]]:
    """(stream, model, owns its weights) of the streams that run, base first."""
    sources = [(BASE, config.model, True)]
    for name, stream in config.streams.items():
        if stream.model is not None:
            sources.append((name, stream.model, True))
        elif stream.same_as is not None:
            other = config.streams.get(stream.same_as)
            sources.append((name, config.model if other is None else other.model or config.model,
                            False))  # fmt: skip
    return sources


def _not_yet(config: Config) -> list[str]:
    """Sections that the schema knows and this version does not serve."""
    problems = []
    if config.registry is not None and config.adapters is None:
        problems.append("registry: records adapters, and there is no section `adapters`")
    for name, stream in config.streams.items():
        if stream.same_as not in (None, BASE):
            problems.append(f"streams.{name}.same_as: only `{BASE}` can be shared at present")
    return problems


def _methods(config: Config, diagnosis: Diagnosis) -> None:
    diagnosis.methods = discover(config.plugins)


def engine_problems(engine: Mapping[str, Any]) -> list[str]:
    """Engine arguments that vLLM does not know, that are ours, or that cannot be served."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = {f.name for f in dataclasses.fields(AsyncEngineArgs)}
    problems = []
    for name in engine:
        if name in RESERVED_ENGINE:
            problems.append(f"engine.{name}: not here: {RESERVED_ENGINE[name]}")
        elif name not in arguments:
            near = difflib.get_close_matches(name.replace("-", "_"), sorted(arguments), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"engine.{name}: vLLM has no such engine argument{hint}")
    problems += [f"engine.{name}: {sentence}" for name, sentence in refusals(engine)]
    problems += refused_environment()
    return problems


def _parsers(config: Config) -> list[str]:
    """Parsers that vLLM does not have: it would look for them after the weights are loaded."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    problems = []
    for key, manager in (("tool_call_parser", ToolParserManager),
                         ("reasoning_parser", ReasoningParserManager)):  # fmt: skip
        name, parsers = getattr(config.chat, key), manager.list_registered()
        if name is not None and name not in parsers:
            problems.append(f"chat.{key}: no such parser (got {name!r}); "
                            f"allowed: one of: {', '.join(parsers)}")  # fmt: skip
    return problems


def _stream(config: Config, diagnosis: Diagnosis, name: str, source: str, owns: bool) -> None:
    point = inspect(source)
    if point.encoder_decoder:
        raise Unusable(f"{point.architecture} is encoder-decoder; streams are decoders alone")
    _served(config, name, point)
    kv_bytes = point.kv_bytes(str(config.engine.get("dtype", "auto")))
    label = source if owns else f"same as {config.streams[name].same_as}"
    diagnosis.streams[name] = StreamFacts(name, label, point, point.vocabulary, kv_bytes, owns)


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


def _beside_hybrid(config: Config, diagnosis: Diagnosis) -> list[str]:
    """What a base whose layers keep a state cannot do."""
    architecture = diagnosis.streams[BASE].checkpoint.architecture
    if not is_hybrid(architecture):
        return []
    refused = beside_hybrid(
        architecture,
        twins=[name for name, stream in config.streams.items() if stream.same_as is not None],
        speculates=config.steering.speculation is not None,
        engine={**config.engine, "enable_lora": config.adapters is not None},
    )
    return [f"{where(BASE)}: {line}" for line in refused]


def _profiles(config: Config, diagnosis: Diagnosis, methods: Registry) -> None:
    for name, profile in config.profiles.items():
        diagnosis.guard(
            f"profiles.{name}",
            lambda n=name, p=profile: _check_profile(config, methods, n, p),  # type: ignore[misc]
        )


def _check_profile(config: Config, methods: Registry, name: str, profile: Any) -> None:
    resolved = check_profile(
        name, profile, methods=methods, snapshot=snapshot(config), limits=config.steering.limits
    )
    check_profile_templates(name, profile, resolved)
    if profile.adapters and config.adapters is None:
        raise BadValue("this server has no adapters: the configuration lacks the section "
                       "`adapters`", field=f"profiles.{name}.adapters")  # fmt: skip


def _vocabularies(config: Config, diagnosis: Diagnosis) -> None:
    """Compares each stream's tokens with the base's; the base's own tell its table's padding."""
    loaded: dict[Path, Vocabulary] = {}
    for name in list(diagnosis.streams):
        diagnosis.guard(where(name), lambda n=name: _overlap(diagnosis, n, loaded))  # type: ignore[misc]
        if not loaded:
            return


def _overlap(diagnosis: Diagnosis, name: str, loaded: dict[Path, Vocabulary]) -> None:
    fact = diagnosis.streams[name]
    for folder in (diagnosis.streams[BASE].checkpoint.folder, fact.checkpoint.folder):
        if folder not in loaded:
            loaded[folder] = load_vocabulary(str(folder))
    base = loaded[diagnosis.streams[BASE].checkpoint.folder]
    laid: Overlap = overlap(base, loaded[fact.checkpoint.folder], name=name)
    diagnosis.overlaps[name] = laid.to_wire()
    diagnosis.streams[name] = dataclasses.replace(fact, shared=int(laid.shared.sum()))


def _architectures(config: Config, diagnosis: Diagnosis) -> list[str]:
    """What vLLM and its attention backend can run."""
    from vllm.platforms import current_platform

    sizes: list[int] | None = None
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
    lines = []
    for name, fact in diagnosis.streams.items():
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
