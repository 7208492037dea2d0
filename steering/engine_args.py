"""vLLM's engine arguments for a steered model. Front end; loads neither torch nor weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from steering.errors import DoesNotFit, SteeringError
from steering.families import beside_hybrid, is_hybrid, stream_architecture
from steering.language import LanguagePart, language_architecture
from steering.plan import BASE
from steering.refused import refusals, refused_environment

ARCHITECTURE = "SteeredForCausalLM"
HYBRID = "SteeredHybridForCausalLM"
"""In its place where layers of the base keep a state."""

BASE_ARCHITECTURES = "coxswain_base_architectures"
"""Attribute of the base's config that keeps what `ARCHITECTURE` replaces."""

WORKER_EXTENSION = "steering.worker.extension.WorkerExtension"
SCHEDULER = "steering.worker.scheduler.SteeredScheduler"
DRAFTER = "steering.worker.step.drafting.Drafter"


SCRATCH = 2
"""Requests with the most candidates that a value stream evaluates at once, a block for each."""


@dataclass(frozen=True, slots=True)
class StreamSource:
    """Where a stream comes from: exactly one of `model`, `same_as` and `on`.

    With `on` it runs nothing: it is a head on another stream, or a tap of one of its layers.

    Args:
        model: path or hub id of a checkpoint.
        same_as: another stream (or `base`) whose weights it shares, with KV of its own.
        head: 'value' or 'classifier' for a stream with a head; None for a language model.
        on: the stream whose hidden state it reads.
        path: folder with the head's tensors (and a LoRA adapter of the body, merged when it is
            loaded), for a stream with a head.
        layer: of a tap, after how many layers of `on` it reads the hidden state; 0: the embeddings.
        norm: of a tap, whether the final norm stands between that and the unembedding.
    """

    model: str | None = None
    same_as: str | None = None
    head: str | None = None
    on: str | None = None
    path: str | None = None
    layer: int | None = None
    norm: bool | None = None


@dataclass(frozen=True, slots=True)
class Speculation:
    """A stream that drafts the steered model's tokens.

    Args:
        draft: name of a stream with a language model of its own.
        tokens: drafts per step, ≥ 1.
    """

    draft: str
    tokens: int


_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes of slots that vLLM offers."""


def slot_rank(max_rank: int) -> int:
    """Rank indices of a slot that has room for `max_rank`, 1 to 512."""
    return next(size for size in _RANKS if size >= max_rank)


def adapter_engine_args(max_sets: int, max_rank: int) -> dict[str, Any]:
    """More engine arguments, for a server that adapts.

    Args:
        max_sets: different sets of adapters in one step, ≥ 1; each slot takes memory in every
            layer of every stream, used or not.
        max_rank: rank indices of a set (`adapters.sets.AdapterSet.rank`), 1 to 512.
    """
    return {
        "enable_lora": True,
        "max_loras": max_sets,
        # The front end holds no more sets in the engine than there are slots.
        "max_cpu_loras": max_sets,
        "max_lora_rank": slot_rank(max_rank),
    }


def steered_engine_args(
    model: str,
    streams: Mapping[str, StreamSource],
    overlaps: Mapping[str, dict[str, Any]] | None = None,
    top_k: int = 64,
    speculation: Speculation | None = None,
    one_product: Sequence[Sequence[str]] = (),
    vectors: bool = False,
    **engine: Any,
) -> dict[str, Any]:
    """Keyword arguments for vLLM's `EngineArgs` / `AsyncEngineArgs`.

    Args:
        model: path or hub id of the base.
        streams: companion streams by name, in the order in which they are laid out.
        overlaps: `steering.vocabulary.Overlap.to_wire()` by stream; a stream that is left out
            shares the base's vocabulary id by id. Give the base's overlap with itself too: it
            tells which rows of its table are padding when all streams are twins.
        top_k: most candidates of a request that value streams evaluate.
        speculation: which stream drafts; None: every step draws one token.
        one_product: sets of streams whose unembeddings are laid beside the base's, on CPUs, so
            that a linear sum of just these is one product. Takes a copy of each table.
        vectors: whether adapters may change the outputs of decoder layers, which takes room in
            every slot, and a call in each layer.
        engine: any other engine argument; they win over our defaults.

    Raises:
        DoesNotFit: a checkpoint cannot be a stream, or an engine argument cannot be served.
    """
    from vllm.transformers_utils.config import get_config

    for name, sentence in refusals(engine):
        raise DoesNotFit(sentence, field=f"engine.{name}")
    for sentence in refused_environment():
        raise DoesNotFit(sentence, field="environment")
    trust = engine.get("trust_remote_code", False)
    config = get_config(model, trust)
    architecture = _architecture("model", config, engine, base=True)
    hybrid = is_hybrid(architecture)
    for name, source in streams.items():
        if source.model is not None:
            body = source.head is not None
            own = get_config(source.model, trust)
            _architecture(f"streams.{name}.model", own, engine, base=False, body=body)
    settings = {
        "streams": {
            name: {k: v for k, v in asdict(source).items() if v is not None}
            for name, source in streams.items()
        },
        "overlaps": dict(overlaps or {}),
        "top_k": top_k,
        "ends": sorted(end_ids(model, config)),
        "vectors": vectors,
        "one_product": [list(streams) for streams in one_product],
        "draft": None if speculation is None else speculation.draft,
        # vLLM forgets them where its own graphs are off.
        "graph_sizes": _capture_sizes(engine.get("compilation_config")),
    }
    overrides = {
        "architectures": [HYBRID if hybrid else ARCHITECTURE],
        BASE_ARCHITECTURES: [architecture],
    }
    ours: dict[str, Any] = {
        "model": model,
        "hf_overrides": (
            LanguagePart(model, overrides) if language_architecture(config) else overrides
        ),
        "worker_extension_cls": WORKER_EXTENSION,
        "scheduler_cls": SCHEDULER,
        # One block table serves every stream: a stream's positions differ from the request's, so
        # blocks must not be given back by the base's sliding window.
        "disable_hybrid_kv_cache_manager": not hybrid,
    }
    if hybrid:
        refused = beside_hybrid(
            architecture,
            twins=[name for name, source in streams.items() if source.same_as is not None],
            speculates=speculation is not None,
            engine=engine,
        )
        if refused:
            raise DoesNotFit(refused[0], field="model")
        ours["enable_prefix_caching"] = False
    if speculation is not None:
        ours["speculative_config"] = {
            "method": "custom_class",
            "model": DRAFTER,
            "num_speculative_tokens": speculation.tokens,
        }
    ours["structured_outputs_config"] = _structured(engine.pop("structured_outputs_config", {}))
    ours["compilation_config"] = _compilation(engine.pop("compilation_config", {}))
    extra = {**engine.pop("additional_config", {}), "coxswain": settings}
    return {**ours, **engine, "additional_config": extra}


def _architecture(
    field: str, config: Any, engine: Mapping[str, Any], *, base: bool, body: bool = False
) -> str:
    """What a stream is served as; `field` is where its checkpoint was named."""
    try:
        return stream_architecture(config, base=base, body=body, engine=engine)
    except SteeringError as error:
        raise type(error)(error.message, field=field, allowed=error.allowed) from error


GRAMMARS = "xgrammar"
"""The backend of grammars, if none is named."""


def _structured(config: Any) -> Any:
    """VLLM's `structured_outputs_config` with a backend that is the same for all requests."""
    return {"backend": GRAMMARS, **config} if isinstance(config, Mapping) else config


def _capture_sizes(config: Any) -> list[int] | None:
    """Numbers of rows that VLLM's `compilation_config` wants graphs for; None for its default."""
    found = config.get("cudagraph_capture_sizes") if isinstance(config, Mapping) else None
    return None if found is None else [int(size) for size in found]


def _compilation(config: Any) -> Any:
    """VLLM's `compilation_config` without captured graphs of its own; `steering.refused.GRAPHS`."""
    return {"cudagraph_mode": "NONE", **config} if isinstance(config, Mapping) else config


def watched(sources: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The streams that have scores, base first, then the heads: the bits of
    `worker/readout/watch.py`.

    Args:
        sources: the streams beside the base, as `StreamSource` fields; None is left out.
    """
    streams = [name for name, source in sources.items() if "on" not in source]
    streams += taps_of(sources)
    heads = [name for kind in ("classifier", "value") for name, source in sources.items()
             if source.get("head") == kind]  # fmt: skip
    return (BASE, *streams, *heads)


def taps_of(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Tap → the stream of which it reads a layer.

    Args:
        sources: the streams beside the base, as `StreamSource` fields; None is left out.
    """
    return {name: source["on"] for name, source in sources.items() if "layer" in source}


def end_ids(model: str, config: Any) -> set[int]:
    """The ids at which the base ends a text: what vLLM stops at when a request says no more.

    Args:
        model: path or hub id of the base.
        config: its `transformers` config.
    """
    from transformers import AutoTokenizer
    from vllm.transformers_utils.config import try_get_generation_config

    generation = try_get_generation_config(model, trust_remote_code=False)
    named = [getattr(c, "eos_token_id", None) for c in (config, generation)]
    with suppress(OSError, ValueError):  # tests serve models without a tokenizer
        named.append(AutoTokenizer.from_pretrained(model).eos_token_id)
    found: set[int] = set()
    for ids in named:
        several = ids if isinstance(ids, list) else [ids]
        found |= {int(i) for i in several if i is not None}
    return found
