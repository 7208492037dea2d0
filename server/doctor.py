"""Checks a configuration before anything is loaded: each problem in one line.

`coxswain doctor` prints the findings; `coxswain serve` runs the same checks first and takes over
what they found out (vocabulary overlaps, sizes).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.checkpoints import Checkpoint, Unusable, inspect
from server.config import RESERVED_ENGINE, Config
from server.console import table
from steering.errors import SteeringError
from steering.method import Snapshot
from steering.plan import BASE
from steering.plugins import PluginError, Registry, discover
from steering.resolve import check_profile
from steering.vocabulary import Overlap, Vocabulary, load_vocabulary, overlap

_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("pipeline_parallel_size", lambda v: v > 1,
     "the streams cannot be split over pipeline stages; use tensor_parallel_size"),
    ("data_parallel_size", lambda v: v > 1,
     "run several servers behind a load balancer instead"),
    ("decode_context_parallel_size", lambda v: v > 1,
     "not with several streams in one block table"),
    ("prefill_context_parallel_size", lambda v: v > 1,
     "not with several streams in one block table"),
    ("enable_dbo", bool, "overlapped half-batches would split rows from their coefficients"),
    ("enable_prompt_embeds", bool, "streams read token ids; embeddings fit one model only"),
    ("async_scheduling", bool, "reports read tokens that lag under it"),
    ("load_format", lambda v: v in ("pt", "npcache"),
     "pickles can run code when they are loaded; safetensors only"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """One line of the table.

    Args:
        name: the stream's name; `base` for the base.
        source: folder or id, or `same as base`.
        checkpoint: its files; the base's for a stream that shares the base's weights.
        shared: ids that mean the same token as in the base.
        kv_bytes: bytes of its key-value cache per token.
        owns_weights: False if it shares another stream's.
    """

    name: str
    source: str
    checkpoint: Checkpoint
    shared: int
    kv_bytes: int
    owns_weights: bool = True

    def describe(self) -> dict[str, Any]:
        """For `/admin/streams`."""
        point = self.checkpoint
        return {
            "source": self.source,
            "architecture": point.architecture,
            "parameters": point.parameters,
            "vocabulary": point.vocabulary,
            "shared_ids": self.shared,
            "context": point.context,
            "kv_bytes_per_token": self.kv_bytes,
        }


@dataclass
class Diagnosis:
    """Everything that was found."""

    problems: list[str] = field(default_factory=list)
    streams: dict[str, StreamFacts] = field(default_factory=dict)
    overlaps: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: Registry | None = None

    def guard(self, field: str, check: Callable[[], None]) -> None:
        """Runs one check; what it raises becomes a line that starts with the field."""
        try:
            check()
        except SteeringError as error:
            self.problems.append(str(error))
        except (Unusable, PluginError) as error:
            self.problems.append(f"{field}: {error}")
        except Exception as error:  # a tokenizer or config that its library cannot read
            first = str(error).strip().split("\n")[0] or "no details"
            self.problems.append(f"{field}: {type(error).__name__}: {first}")

    def table(self) -> str:
        """The streams in columns."""
        head = ("stream", "architecture", "parameters", "vocabulary", "shared ids", "context",
                "KV bytes/token")  # fmt: skip
        rows = [
            (
                fact.name,
                fact.checkpoint.architecture,
                _short(fact.checkpoint.parameters) if fact.owns_weights else "(shared)",
                f"{fact.checkpoint.vocabulary}",
                f"{fact.shared}",
                f"{fact.checkpoint.context or '?'}",
                f"{fact.kv_bytes}",
            )
            for fact in self.streams.values()
        ]
        return table([head, *rows])


def snapshot(config: Config) -> Snapshot:
    """The streams as the methods see them."""
    heads = {name: stream.head or "lm" for name, stream in config.streams.items()}
    return Snapshot({BASE: "lm", **heads})


def context_length(config: Config, base: Checkpoint) -> int | None:
    """Tokens of the longest request: `engine.max_model_len`, else what the base reaches."""
    asked = config.engine.get("max_model_len")
    return asked if isinstance(asked, int) and asked > 0 else base.context


def diagnose(config: Config) -> Diagnosis:
    """All checks, in order; later ones are left out where an earlier one found no ground."""
    found = Diagnosis()
    found.problems += _not_yet(config)
    found.guard("plugins", lambda: _methods(config, found))
    found.problems += engine_problems(config.engine)
    for name, source, owns in _sources(config):
        found.guard(_where(name), lambda n=name, s=source, o=owns: _stream(config, found, n, s, o))  # type: ignore[misc]
    if found.methods is not None:
        _profiles(config, found, found.methods)
    if BASE in found.streams:
        _vocabularies(config, found)
        found.problems += _architectures(found)
        found.problems += _contexts(config, found)
        found.problems += _memory(config, found)
    return found


def _where(name: str) -> str:
    return "model" if name == BASE else f"streams.{name}"


def _sources(config: Config) -> list[tuple[str, str, bool]]:
    """(stream, model, owns its weights), base first; heads are refused before."""
    found = [(BASE, config.model, True)]
    for name, stream in config.streams.items():
        if stream.model is not None and stream.head is None:
            found.append((name, stream.model, True))
        elif stream.same_as is not None:
            other = config.streams.get(stream.same_as)
            found.append((name, config.model if other is None else other.model or config.model,
                          False))  # fmt: skip
    return found


def _not_yet(config: Config) -> list[str]:
    """Sections that the schema knows and this version does not serve."""
    found = []
    if config.adapters is not None:
        found.append("adapters: LoRA adapters are not served yet; leave the section out")
    if config.registry is not None and config.registry.url is not None:
        found.append("registry.url: a shared registry is not served yet; leave it out")
    for name, stream in config.streams.items():
        if stream.head is not None:
            found.append(f"streams.{name}.head: streams with a {stream.head} head are not served "
                         "yet; leave the stream out")  # fmt: skip
        elif stream.same_as not in (None, BASE):
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
    for name, refused, why in _REFUSED:
        if name in engine:
            try:
                if refused(engine[name]):
                    found.append(f"engine.{name}: refused (got {engine[name]!r}): {why}")
            except TypeError:
                found.append(f"engine.{name}: not a usable value (got {engine[name]!r})")
    return found


def _stream(config: Config, found: Diagnosis, name: str, source: str, owns: bool) -> None:
    point = inspect(source)
    kinds = (("encoder-decoder", point.encoder_decoder), ("multimodal", point.multimodal),
             ("recurrent (state-space)", point.recurrent))  # fmt: skip
    for kind, is_kind in kinds:
        if is_kind:
            raise Unusable(f"{point.architecture} is {kind}; streams are plain decoder models")
    kv_bytes = point.kv_bytes(str(config.engine.get("dtype", "auto")))
    shown = source if owns else f"same as {config.streams[name].same_as}"
    found.streams[name] = StreamFacts(name, shown, point, point.vocabulary, kv_bytes, owns)


def _profiles(config: Config, found: Diagnosis, methods: Registry) -> None:
    for name, profile in config.profiles.items():
        found.guard(
            f"profiles.{name}",
            lambda n=name, p=profile: _check_profile(config, methods, n, p),  # type: ignore[misc]
        )


def _check_profile(config: Config, methods: Registry, name: str, profile: Any) -> None:
    check_profile(
        name, profile, methods=methods, snapshot=snapshot(config), limits=config.steering.limits
    )


def _vocabularies(config: Config, found: Diagnosis) -> None:
    """Compares each stream's tokens with the base's."""
    loaded: list[Vocabulary] = []
    found.guard("model", lambda: loaded.append(
        load_vocabulary(str(found.streams[BASE].checkpoint.folder))))  # fmt: skip
    if not loaded:
        return
    for name, fact in list(found.streams.items()):
        if name != BASE and fact.owns_weights:
            found.guard(f"streams.{name}", lambda n=name: _overlap(found, n, loaded[0]))  # type: ignore[misc]


def _overlap(found: Diagnosis, name: str, base: Vocabulary) -> None:
    fact = found.streams[name]
    laid: Overlap = overlap(base, load_vocabulary(str(fact.checkpoint.folder)), name=name)
    found.overlaps[name] = laid.to_wire()
    found.streams[name] = dataclasses.replace(fact, shared=int(laid.shared.sum()))


def _architectures(found: Diagnosis) -> list[str]:
    """What vLLM and its attention backend can run."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    sizes: list[int] | None = None
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
    lines = []
    for name, fact in found.streams.items():
        if not fact.owns_weights:
            continue
        why = _unsupported(ModelRegistry, fact.checkpoint.architecture)
        if why is not None:
            lines.append(f"{_where(name)}: {why}")
        size = fact.checkpoint.head_size
        if sizes is not None and size and size not in sizes:
            allowed = ", ".join(map(str, sizes))
            lines.append(f"{_where(name)}: attention heads of size {size}; the CPU backend has "
                         f"{allowed}")  # fmt: skip
    return lines


def _unsupported(registry: Any, architecture: str) -> str | None:
    """Why vLLM's model of this architecture cannot be a stream; None if it can."""
    if architecture not in registry.get_supported_archs():
        return f"vLLM does not support the architecture {architecture}"
    info = registry.models[architecture].inspect_model_cls()
    if not info.is_text_generation_model:
        return f"{architecture} does not generate text"
    if info.supports_multimodal:
        return f"{architecture} is multimodal; streams are plain decoder models"
    if info.has_inner_state or info.is_attention_free or info.is_hybrid:
        return f"{architecture} is recurrent; streams are plain decoder models"
    return None


def _contexts(config: Config, found: Diagnosis) -> list[str]:
    """Streams that cannot hold the longest request."""
    length = context_length(config, found.streams[BASE].checkpoint)
    if length is None:
        return ["engine.max_model_len: is required, because the base does not say its context"]
    return [
        f"{_where(name)}: holds {fact.checkpoint.context} tokens, requests may have {length}; "
        f"set engine.max_model_len to at most {fact.checkpoint.context}"
        for name, fact in found.streams.items()
        if fact.checkpoint.context is not None and fact.checkpoint.context < length
    ]


def _memory(config: Config, found: Diagnosis) -> list[str]:
    """Whether the weights fit, and the key-value cache of one request of full length."""
    length = context_length(config, found.streams[BASE].checkpoint) or 0
    dtype = str(config.engine.get("dtype", "auto"))
    weights = sum(
        f.checkpoint.weight_bytes(dtype) for f in found.streams.values() if f.owns_weights
    )
    cache = length * sum(fact.kv_bytes for fact in found.streams.values())
    machine, what = _machine(config)
    given = config.engine.get("kv_cache_memory_bytes")
    lines = []
    if isinstance(given, int) and cache > given:
        lines.append(
            f"engine.kv_cache_memory_bytes: {_size(given)} cannot hold one request of {length} "
            f"tokens, which takes {_size(cache)}"
        )
    needed = weights + (given if isinstance(given, int) else cache)
    if needed > machine:
        lines.append(
            f"memory: {_size(weights)} of weights and {_size(needed - weights)} of key-value cache "
            f"are more than the {_size(machine)} of {what}"
        )
    return lines


def _machine(config: Config) -> tuple[int, str]:
    """(bytes, name) of the memory that the models go into."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        psutil: Any = importlib.import_module("psutil")  # without type hints
        return int(psutil.virtual_memory().available), "free memory"
    cards = int(config.engine.get("tensor_parallel_size", 1))
    share = float(config.engine.get("gpu_memory_utilization", 0.92))
    return int(current_platform.get_device_total_memory() * cards * share), "GPU memory"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _short(count: float) -> str:
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G"
