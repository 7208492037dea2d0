"""Drives a real vLLM engine with the steered model, in this process, as the server would."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
# `tests/emulated` drives the same engine on Model Runner V2.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

from adapters.formats.artefact import Artefact
from adapters.formats.base import plain_shapes
from adapters.formats.inspect import inspect
from adapters.sets import AdapterSet
from adapters.where import read_where
from steering.adapters import ResolvedAdapter, adapt
from steering.bans import with_bans
from steering.engine_args import Speculation, StreamSource, steered_engine_args
from steering.kernels.reference import mix_reference
from steering.method import Limits, Snapshot
from steering.phases import begun, with_ids
from steering.placing import placed, with_text_ids
from steering.plan import BASE, Recipe, Report, SteeringPlan
from steering.plugins import discover
from steering.prompts import align
from steering.resolve import resolve
from steering.vocabulary import Overlap, load_vocabulary, overlap
from steering.wire import SteeringPayload, pack
from tests.adapters.models import Applied
from tests.adapters.models import adapted as adapted_model
from tests.engine.heads import Headed
from tests.models import VOCAB_SIZE, make_model, make_tokenizer
from tests.reference import Mix, Step, TapModel, decode, load, over_vocabularies

ON_V2 = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"

BLOCK = 32
"""Tokens per KV block: small, so that many tests cross block boundaries."""

METHODS = discover()

STREAMS: Mapping[str, tuple[str, int] | str] = {
    "chat": ("qwen2", VOCAB_SIZE),
    "third": ("qwen3", VOCAB_SIZE),
    "plain": ("gpt2", VOCAB_SIZE),
    "opt": ("opt", VOCAB_SIZE),
    "short": ("llama", VOCAB_SIZE - 10),
    "twin": "base",
}
"""Companions of other architectures, one that lacks the tokenizer's last 10 ids, and a twin."""

ERRORS: list[float] = []
"""Of every log-probability that was compared, nats; the session's summary shows the largest."""


@dataclass(frozen=True)
class Case:
    """One request.

    Args:
        prompt: the base's prompt ids.
        spec: its steering object, or None.
        own: stream → prompt ids of its own.
        max_tokens: tokens to draw.
        arrives: engine step before which it joins.
        params: more sampling parameters.
        report: 'off', 'summary' or 'tokens'.
        adapters: what the streams' layers add.
        reply: an earlier reply, which the head of `best_of_n` reads; nothing is steered then.
    """

    prompt: Sequence[int]
    spec: Mapping[str, Any] | None = None
    own: Mapping[str, Sequence[int]] = field(default_factory=dict)
    max_tokens: int = 12
    arrives: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    report: Report = "off"
    adapters: Sequence[Use] = ()
    reply: Sequence[int] = ()


@dataclass(frozen=True)
class Use:
    """One adapter of a request.

    Args:
        name: as in `Engine.adapters`.
        weight: what it is multiplied by.
        stream: the stream whose layers it changes.
        top_k: of a pack; None: the pack's own.
        temperature: of a pack; None: the pack's own.
        where: JSON, at which positions it acts; '': where its file says.
    """

    name: str
    weight: float = 1.0
    stream: str = BASE
    top_k: int | None = None
    temperature: float | None = None
    where: str = ""


class Engine:
    """A base with streams, and the `transformers` models that it must agree with.

    Args:
        folder: where the random models are written.
        base: (architecture, table size), or the folder of a checkpoint.
        streams: name → (architecture, table size), or the stream whose weights it shares.
        heads: makes streams with heads, given a folder and those of the other streams.
        speculation: which stream drafts.
        taps: name → the layer that it reads.
        engine: more vLLM engine arguments.
    """

    def __init__(
        self,
        folder: Path,
        base: tuple[str, int] | Path,
        streams: Mapping[str, tuple[str, int] | str],
        heads: Callable[[Path, Mapping[str, Path]], Mapping[str, Headed]] = lambda *_: {},
        speculation: Speculation | None = None,
        taps: Mapping[str, StreamSource] = MappingProxyType({}),
        **engine: Any,
    ) -> None:
        from vllm import LLM

        self.folders: dict[str, Path] = {}
        for seed, (name, source) in enumerate({BASE: base, **streams}.items()):
            if isinstance(source, Path):
                self.folders[name] = source
            elif not isinstance(source, str):
                architecture, table = source
                self.folders[name] = make_model(
                    folder / name, architecture, seed=seed, vocab_size=table
                )
        self.same_as = {n: s for n, s in streams.items() if isinstance(s, str)}
        vocabularies = {n: load_vocabulary(str(f)) for n, f in self.folders.items()}
        self.overlaps: dict[str, Overlap] = {
            n: overlap(vocabularies[BASE], v, name=n) for n, v in vocabularies.items()
        }
        sources = {
            n: StreamSource(same_as=s) if isinstance(s, str) else StreamSource(str(self.folders[n]))
            for n, s in streams.items()
        }
        self.heads = heads(folder, self.folders)
        sources |= {n: h.source for n, h in self.heads.items()}
        sources |= taps
        self.taps = {n: (t.on or "", t.layer or 0, bool(t.norm)) for n, t in taps.items()}
        self.snapshot = Snapshot(
            {BASE: "lm", **{n: source.head or "lm" for n, source in sources.items()}},
            {n: h.on for n, h in self.heads.items() if h.on is not None},
            {n: on for n, (on, _, _) in self.taps.items()},
        )
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 512,
            "block_size": BLOCK,
            "max_num_seqs": 24,
            "max_num_batched_tokens": 96,
            "kv_cache_memory_bytes": 128 << 20,
            "distributed_executor_backend": "uni",
            "disable_log_stats": False,
            "enforce_eager": True,
        }
        wires = {n: o.to_wire() for n, o in self.overlaps.items()}
        arguments = steered_engine_args(
            str(self.folders[BASE]),
            sources,
            wires,
            speculation=speculation,
            **{**defaults, **engine},
        )
        self.llm = LLM(**arguments)
        bound = self.llm.collective_rpc("coxswain_bind")[0]
        self.layers: dict[str, dict[str, tuple[int, int]]] = bound["layers"]
        self._served = 0
        self.adapters: dict[str, Artefact] = {}
        self.digests: dict[str, str] = {}

    def load_adapters(self, folders: Mapping[str, Path], stream: str = BASE) -> None:
        """Makes adapters known that are made for the model of `stream`."""
        shapes = replace(plain_shapes(self.folders[stream]), layers=self.layers[stream], whole=True)
        for name, folder in folders.items():
            self.adapters[name] = inspect(folder, shapes, max_rank=512)
            self.digests[name] = self.adapters[name].digest()

    # --- the engine -----------------------------------------------------------------------------

    def plan(self, case: Case) -> SteeringPlan | None:
        """What the front end would make of the case."""
        if case.spec is None:
            return None if case.report == "off" else SteeringPlan("base", report=case.report)
        prompts = {name: {"token_ids": list(ids)} for name, ids in case.own.items()}
        report = {"off": False, "summary": True, "tokens": "tokens"}[case.report]
        spec = {**case.spec, "prompts": prompts, "report": report}
        wide = Limits(strength=(0, 10), weight=(-10, 10))
        resolved = resolve(spec, methods=METHODS, snapshot=self.snapshot, limits=wide)
        plan = resolved.with_prompts({n: tuple(case.own[n]) for n in resolved.prompts})
        encode = partial(make_tokenizer().encode, add_special_tokens=False)
        return begun(with_ids(plan, encode, resolved.phase_fields), case.prompt)

    def adapted(self, case: Case) -> tuple[SteeringPlan | None, AdapterSet | None]:
        """The case's plan with its adapters, and their set."""
        plan = self.plan(case)
        if not case.adapters:
            return plan, None
        chosen = [
            ResolvedAdapter(
                self.adapters[use.name],
                self.digests[use.name],
                use.stream,
                use.weight,
                use.top_k,
                use.temperature,
                where=read_where(json.loads(use.where), "where") if use.where else None,
            )
            for use in case.adapters
        ]
        owners = {name: self.same_as.get(name, name) for name in self.snapshot.streams}
        plan, found = adapt(plan or SteeringPlan("base"), chosen, owners)
        encode = partial(make_tokenizer().encode, add_special_tokens=False)
        return placed(with_text_ids(plan, encode), case.prompt), found

    def add(self, case: Case, *, salt: str = "") -> str:
        """Submits a case; returns its tag, which is also its request id."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        self._served += 1
        tag = f"case{self._served}"
        params: dict[str, Any] = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True}
        params["output_kind"] = RequestOutputKind.FINAL_ONLY
        params |= {"max_tokens": case.max_tokens, **case.params}
        plan, adapters = self.adapted(case)
        lora = LoRARequest(**adapters.lora_request()) if adapters else None
        ids, key = list(case.prompt), ""
        if plan is not None and (plan.steers or plan.report != "off" or plan.adapters):
            plan = plan.scoring if case.reply else plan
            ids, pad = align(case.prompt, plan)
            ids, key = [*ids, *case.reply], plan.cache_key(pad)
            payload = SteeringPayload(
                plan, pad, tag if plan.report != "off" else "", len(case.reply), salt or None
            )
            params["extra_args"] = {**params.get("extra_args", {}), **pack(payload)}
            params["logit_bias"] = with_bans(params.get("logit_bias"), plan)
        prompt = TokensPrompt(prompt_token_ids=ids, cache_salt=salt + key or None)
        self.llm.llm_engine.add_request(tag, prompt, SamplingParams(**params), lora_request=lora)
        return tag

    def run(self, cases: Sequence[Case], *, salt: str = "") -> list[Any]:
        """Runs cases together, each joining at its step; their final outputs in order."""
        waiting = sorted(enumerate(cases), key=lambda pair: pair[1].arrives)
        tags: dict[int, str] = {}
        outputs: dict[str, Any] = {}
        step = 0
        while waiting or self.llm.llm_engine.has_unfinished_requests():
            while waiting and waiting[0][1].arrives <= step:
                index, case = waiting.pop(0)
                tags[index] = self.add(case, salt=salt)
            for output in self.llm.llm_engine.step():
                if output.finished:
                    outputs[output.request_id] = output
            step += 1
        self.tags = [tags[i] for i in range(len(cases))]
        return [outputs[tag] for tag in self.tags]

    def counters(self) -> dict[str, Any]:
        """The worker's cumulative counters."""
        found: dict[str, Any] = self.llm.collective_rpc("coxswain_counters")[0]
        return found

    def report(self, tag: str, output: Any) -> dict[str, Any]:
        """A finished request's report, by choice."""
        counts = {str(o.index): len(o.token_ids) for o in output.outputs}
        found: dict[str, Any] = self.llm.collective_rpc("coxswain_report", args=(tag, counts))[0]
        return found

    @property
    def compiled(self) -> bool:
        """Whether the streams run as compiled code."""
        return bool(self.llm.llm_engine.vllm_config.compilation_config.mode)

    def preemptions(self) -> int:
        """Requests preempted since start."""
        metrics = {m.name: m for m in self.llm.get_metrics()}
        return int(metrics["vllm:num_preemptions"].value)

    # --- the reference --------------------------------------------------------------------------

    def streams(self, case: Case) -> tuple[str, ...]:
        """Base and companions that the case uses."""
        plan = self.plan(case)
        return (BASE, *(plan.streams if plan else ()))

    def mix(self, case: Case) -> Mix:
        """The case's method by its own reference, over this engine's vocabularies."""
        plan = self.plan(case)
        if case.spec is None or plan is None or not plan.steers:
            return lambda logits: logits[BASE]
        unshared = {
            name: np.flatnonzero(~self.overlaps[name].shared).tolist()
            for name in plan.streams
            if name in self.overlaps
        }
        if not any(unshared.values()) and not self.padded:
            method = METHODS[case.spec["method"]]
            return partial(method.reference, method.config.model_validate(case.spec))
        recipe = Recipe(dict(plan.weights), plan.rule, layers=plan.layers)
        return over_vocabularies(partial(mix_reference, recipe), unshared, self.padded)

    def model(self, stream: str, uses: Sequence[Use] = ()) -> Any:
        """A stream's model in `transformers`, with its adapters."""
        if stream in self.taps:
            on, layer, norm = self.taps[stream]
            return TapModel(self.model(on, uses), layer, norm)
        folder = self.folders[self.same_as.get(stream, stream)]
        own = [use for use in uses if use.stream == stream]
        if not own:
            return load(folder)
        return adapted_model(
            folder,
            tuple(
                Applied(
                    self.adapters[use.name].folder,
                    use.weight,
                    use.top_k,
                    use.temperature,
                    use.where,
                )
                for use in own
            ),
        )

    @property
    def padded(self) -> list[int]:
        """Rows of the base's table that are no token."""
        return [int(i) for i in self.overlaps[BASE].padded]

    def reference(self, case: Case, **options: Any) -> list[Step]:
        """What the case must give."""
        plan = self.plan(case)
        taps = plan.taps if plan else ()
        names = (*self.streams(case), *taps)
        own = dict(case.own)
        own |= {n: own[self.taps[n][0]] for n in taps if self.taps[n][0] in own}
        models = {n: self.model(n, case.adapters) for n in names}
        tables = {n: self.overlaps[n].read_as for n in names[1:] if n in self.overlaps}
        read_as = {n: table.tolist() for n, table in tables.items() if table is not None}
        return decode(
            models,
            {BASE: case.prompt, **{n: p for n, p in own.items() if n in names}},
            self.mix(case),
            max_tokens=case.max_tokens,
            read_as=read_as,
            **options,
        )


def tokens(output: Any, choice: int = 0) -> list[int]:
    """The drawn ids of one choice."""
    return list(output.outputs[choice].token_ids)


def logprobs(output: Any, choice: int = 0) -> list[float]:
    """The log-probability of each drawn id."""
    drawn = output.outputs[choice]
    return [entry[t].logprob for entry, t in zip(drawn.logprobs, drawn.token_ids, strict=True)]
