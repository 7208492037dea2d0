"""The steered model: a base and its streams as one vLLM model class.

vLLM sees one model with more attention layers, so its scheduler, paged KV cache, prefix caching,
speculation, structured output and sampler work on it unchanged. Lives in the worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from vllm.config import VllmConfig

from steering.engine_args import taps_of, watched
from steering.worker import ranks
from steering.worker.adapting import lora_seam
from steering.worker.adapting import sets as lora_sets
from steering.worker.plan.batches import Int32, Int64
from steering.worker.plan.ends import EndSets
from steering.worker.plan.layout import Layout
from steering.worker.plan.phases import PhasedStep
from steering.worker.plan.request_state import RequestStates
from steering.worker.plan.staging import Staging
from steering.worker.plan.step_plan import StepPlan, plan_step
from steering.worker.plan.texts import Told, counts_reply
from steering.worker.readout import heads, overlaps
from steering.worker.readout.one_product import OneProduct, one_product
from steering.worker.readout.readout import Readout
from steering.worker.readout.report import choice_of
from steering.worker.readout.reporter import Reporter
from steering.worker.readout.scoring import Scoring
from steering.worker.readout.triton import TritonReadout, readout_class
from steering.worker.readout.watch import Watch
from steering.worker.runners.v1 import V1View
from steering.worker.runners.v1_speculation import SpeculationSeam
from steering.worker.runners.view import RunnerView
from steering.worker.step.contexts import StreamContexts
from steering.worker.step.drafting import Drafting, Drafts
from steering.worker.step.graphs import captured
from steering.worker.step.passes import Counters, forward
from steering.worker.step.run import Step, Tap
from steering.worker.step.scratch import scratch_blocks
from steering.worker.step.stream_graph import Source
from steering.worker.step.values import ValueStreams
from steering.worker.streams.compiled import compiling
from steering.worker.streams.models import Streams, hidden_width
from steering.worker.streams.taps import Taps


class SteeredForCausalLM(nn.Module):
    """Base plus companion streams; the read-out sum happens in `compute_logits`.

    Settings come in `additional_config["coxswain"]` (see `steering.engine_args`). Until `bind`
    has handed it the model runner, it runs every stream on whatever it is given: that is what
    vLLM's profiling and compilation runs need.
    """

    # vLLM reads these from any class that may carry LoRA adapters.
    supports_lora = True
    is_hybrid = False
    is_3d_moe_weight = False
    is_non_gated_moe = False
    embedding_modules: dict[str, str] = {}
    lora_skip_prefixes: list[str] = []
    # Each stream's model has its own (`adapter_layers`); vLLM would try to merge them into none.
    packed_modules_mapping: dict[str, list[str]] = {"": []}

    base: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        settings = vllm_config.additional_config["coxswain"]
        self._sources: dict[str, dict[str, Any]] = settings["streams"]
        streams = Streams(self, self._sources, vllm_config)
        self._streams, self._forwards = streams, streams.models
        models = dict(zip(streams.names, streams.models, strict=True))
        self._tapped = taps_of(self._sources)
        self._taps = Taps(self._sources, self._tapped, models, vllm_config)
        # Taps are the last: the streams that run have the same places with and without them.
        self.names: tuple[str, ...] = (*streams.names, *self._tapped)
        self._models = [*streams.models, *(models[on] for on in self._tapped.values())]
        self.config = self.base.config
        self._widths = {n: hidden_width(m) for n, m in zip(self.names, self._models, strict=True)}
        self.vectors: bool = settings["vectors"]
        self._sums: list[list[str]] = settings["one_product"]
        built = heads.build(
            self._sources,
            self._widths,
            vllm_config.model_config.hf_config.vocab_size,
            ranks.the_firsts if ranks.several() else None,
        )
        self.heads = {n: h for n, h in built.items() if self._sources[n]["head"] == "classifier"}
        self._value_heads = {n: h for n, h in built.items() if n not in self.heads}
        self._readout = self._build_readout(settings, vllm_config)
        # Index of the stream that drafts, 0 without speculation.
        self._draft = self.names.index(settings["draft"] or self.names[0])
        self._drafting: Drafting | None = None
        self._view: RunnerView | None = None
        self._step: Step | None = None
        self._plan: StepPlan | None = None
        self._lora_manager: Any = None
        own = self._readout.ends.own
        self.states = RequestStates(
            self.names, tuple(self.heads), own, self.is_hybrid, self._tapped
        )
        readings = dict(zip(built, heads.readings(self._sources, self.names, built), strict=True))
        layout, watch = self._readout.layout, self._readout.watch
        self.reporter = Reporter(self.names, layout, readings, watch, len(self._tapped))
        self._scoring = Scoring(self._readout, self.reporter)
        none = dict.fromkeys(streams.names, 0)
        self.counters = Counters(dict(none), dict(none))
        lora_seam.prepare(self, vllm_config)

    def _build_readout(self, settings: dict[str, Any], vllm_config: VllmConfig) -> Readout:
        candidates = settings["top_k"] if self._value_heads else 0
        bodies = {name for name, source in self._sources.items() if "head" in source}
        pairs = zip(self.names, self._models, strict=True)
        originals = self._streams.original
        originals = {**originals, **{n: originals[on] for n, on in self._tapped.items()}}
        groups: dict[str, list[int]] = {}
        for name in self._tapped:
            groups.setdefault(originals[name], []).append(self.names.index(name))
        unembed = [None if n in bodies else m.compute_logits for n, m in pairs]
        return readout_class()(
            Layout(tuple(self._widths.values()), vllm_config.model_config.dtype, candidates),
            unembed,
            overlaps.vocabularies(self.names, originals, settings["overlaps"]),
            overlaps.padded(settings["overlaps"]),
            heads.readings(self._sources, self.names, self.heads),
            EndSets(settings["ends"], vllm_config.model_config.get_vocab_size()),
            Watch(watched(self._sources)),
            taps=[*groups.values()],
        )

    def _build_values(self, scratch: int, size: int) -> ValueStreams:
        index = {name: self.names.index(name) for name in self._value_heads}
        return ValueStreams(
            {index[name]: head for name, head in self._value_heads.items()},
            index,
            {i: self._readout.vocabularies[i].read_as for i in index.values()},
            scratch,
            size,
        )

    def bind(self, runner: Any) -> None:
        """Takes the model runner, once its KV cache is there.

        Raises:
            ValueError: the engine would answer wrongly; the message says why.
        """
        self._taps.try_models()
        view = self._view = _view_of(runner, self.states)
        layers, sizes = self._streams.layers(), view.kernel_block_sizes
        scratch = scratch_blocks(runner.vllm_config, runner.kv_cache_config)
        contexts = StreamContexts(runner, sizes, layers, view.block_table, scratch)
        names = self._streams.names
        adapters = lora_seam.LoraSeam(runner, names) if runner.lora_config else None
        if adapters is not None:
            adapters.warm_up()
        self._readout = replace(self._readout, one_product=self._one_product(runner))
        self._scoring.readout = self._readout
        sources = self._graph_sources(layers, adapters)
        self._step = Step(
            names=self._streams.names,
            original=self._streams.original,
            models=self._forwards,
            readout=self._readout,
            contexts=contexts,
            adapters=adapters,
            counters=self.counters,
            graphs=captured(runner, view.fixed_block_tables, sizes, sources),
            values=self._build_values(scratch, runner.vllm_config.model_config.get_vocab_size()),
            taps=self._taps_by_stream(),
            holds=view.holds,
        )
        if self._draft:
            self._begin_drafting(runner, view)
        view.observe(self._readout.watch, self.reporter.sampled)
        view.truncate(self._readout.padded)
        if isinstance(self._readout, TritonReadout):
            self._readout.warm_up(runner.device)

    def _begin_drafting(self, runner: Any, view: RunnerView) -> None:
        assert self._step is not None
        model, tokens = runner.vllm_config.model_config, runner.vllm_config.num_speculative_tokens
        size = model.get_vocab_size()
        if isinstance(view, V1View):
            score = partial(self._step.draft_scores, self._draft, size=size)
            seam = SpeculationSeam(runner)
            self._drafting = Drafting(self._draft, tokens, model.max_model_len, score, seam)
        else:
            from steering.worker.runners.v2 import V2View

            assert isinstance(view, V2View)
            step = self._step
            drafts = step.drafts = Drafts(self._draft, tokens, model.max_model_len, size)

            def draft(newest: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
                rows, _ = drafts.rows(self._ran)
                self._count_drafts(dict.fromkeys(rows.tolist(), tokens))
                return step.draft(newest, ids)

            view.draft_with(draft)

    @property
    def _ran(self) -> StepPlan:
        """The plan of the step that was run last."""
        assert self._plan is not None
        return self._plan

    def _graph_sources(
        self, layers: Sequence[dict[str, str]], adapters: lora_seam.LoraSeam | None
    ) -> list[Source]:
        """[S] what the streams' graphs are made of."""
        found = []
        for i, name in enumerate(self._streams.names):
            launching = nullcontext if adapters is None else partial(adapters.launching, name)
            table = self._readout.vocabularies[i].read_as
            run = partial(forward, self._forwards[i])
            found.append(Source(name, run, layers[i], table, launching))
        return found

    def _taps_by_stream(self) -> dict[int, list[Tap]]:
        """Stream → its taps."""
        found: dict[int, list[Tap]] = {}
        for name, on in self._tapped.items():
            tap = Tap(self.names.index(name), self._taps.kept(name), self._taps.finish(name))
            found.setdefault(self.names.index(on), []).append(tap)
        return found

    def _one_product(self, runner: Any) -> OneProduct | None:
        """Not for tables that are split over ranks; side by side where that was measured."""
        if runner.vllm_config.parallel_config.tensor_parallel_size > 1:
            return None
        whole = [u is not None for u in self._readout.unembed]
        sums = self._sums if runner.device.type == "cpu" else []
        indices = [[self.names.index(name) for name in names] for names in sums]
        return one_product(self._readout.layout, self._models, whole, indices)

    # --- what vLLM calls ------------------------------------------------------------------------

    @property
    def adapted_streams(self) -> dict[str, Any]:
        """The streams that own their weights, and their models."""
        pairs = zip(self._streams.names, self._forwards, strict=True)
        return {n: m for n, m in pairs if self._streams.original[n] == n}

    @property
    def lora_manager(self) -> Any:
        """What vLLM manages the LoRA slots with; it sets this when it has wrapped the layers."""
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: Any) -> None:
        self._lora_manager = manager
        lora_sets.arrange(manager)

    @staticmethod
    def get_model_state_cls() -> type:
        """Model Runner V2's state of this model's requests."""
        from steering.worker.runners.v2 import SteeredModelState

        return SteeredModelState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The base's input embeddings, [T, H_0]."""
        return self.base.embed_input_ids(input_ids)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the base from `weights` and every companion from its own checkpoint."""
        return self._streams.load(weights)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """[T, H_0] when no row of this step is steered, else [T, layout.width]."""
        schedule = None if self._view is None else self._view.schedule()
        if self._view is None or self._step is None or schedule is None:
            self._plan = None
            self._scoring.begin(None, Staging())
            return self._forward_all(input_ids, positions, inputs_embeds)
        tables = self.states.apply(schedule.request_ids)
        plan = self._plan = plan_step(schedule, tables)
        staging = Staging()
        self._scoring.begin(plan, staging)
        sets = self._view.adapter_sets(len(schedule.request_ids))
        self._step.begin(plan, sets, self._told(plan, input_ids, positions))
        if not tables.steered:
            return self._step.base(input_ids, positions, inputs_embeds, staging)
        assert input_ids is not None
        hidden = self._step.steered(plan, input_ids, positions, self._control(plan), staging)
        if tables.reported and self._step.adapted is not None:
            self.reporter.routes(schedule.request_ids, tables, self._step.adapted.routed)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[R, V] scores of the steered model, a pure function of the rows."""
        return self._scoring(hidden)

    def draft(self, rows: Int64, newest: Int64, token_ids: Int32) -> dict[int, list[int]]:
        """Drafts what may follow the step that was run last; see `Drafting`."""
        assert self._drafting is not None
        plan = self._ran
        sound = ~np.isin(rows, [*self._readout.watch.at_fault])
        rows, newest, token_ids = rows[sound], newest[sound], token_ids[sound]
        drafts = self._drafting(plan.tables, rows, newest, token_ids)
        self._count_drafts({row: len(ids) for row, ids in drafts.items()})
        return drafts

    def _count_drafts(self, drafts: Mapping[int, int]) -> None:
        """Counts the passes of the draft stream in reports: row → how many."""
        for row, state in self._ran.tables.reported:
            if row in drafts:
                choice = choice_of(self._ran.schedule.request_ids[row])
                tally = self.reporter.book.tally(state.tag, choice)
                tally.draft(self.names[self._draft], drafts[row])

    def _forward_all(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """What vLLM's profiling and compilation need: every stream, on whatever is given."""
        layout, streams = self._readout.layout, self._streams
        self._taps.try_models()
        own = [i for i, name in enumerate(streams.names) if streams.original[name] == name]
        out: torch.Tensor | None = None
        for number, i in enumerate(own, 1):
            model, embeds = self._forwards[i], None if i else inputs_embeds
            with compiling(model, streams.names[i], number, len(own)):
                hidden = forward(model, input_ids, positions, embeds)
            if layout.streams == 1:
                return hidden
            if out is None:
                out = hidden.new_zeros(positions.shape[0], layout.width)
            out[:, layout.columns(i)] = hidden
        assert out is not None
        return out

    def _told(
        self, plan: StepPlan, input_ids: torch.Tensor | None, positions: torch.Tensor
    ) -> Told:
        """What the host has to know of a step's tokens to say where adapters act."""
        texts, schedule, seen, exact = plan.tables.texts, plan.schedule, {}, None
        if texts is not None:
            assert self._view is not None and input_ids is not None
            replies = self._view.replies(texts.rows, schedule)
            seen = texts.seen(replies, schedule, plan.tables.lengths, input_ids, positions)
        if not schedule.exact and counts_reply(plan.tables.adapters):
            exact = positions[: schedule.tokens].cpu().numpy()
        return Told(seen, exact)

    def _control(self, plan: StepPlan) -> npt.NDArray[np.float32] | PhasedStep:
        """[T, S + EXTRA] the control of this step's tokens."""
        control, schedule = plan.tables.control, plan.schedule
        if (phases := plan.tables.phases) is not None:
            assert self._view is not None
            replies = self._view.replies(phases.watched, schedule) if phases.watched.size else None
            return PhasedStep(phases, schedule, replies)
        if schedule.tokens == len(control):
            return control
        return np.repeat(control, schedule.lengths, axis=0)


def _view_of(runner: Any, states: RequestStates) -> RunnerView:
    """The view of either of vLLM's runners; V2 has a model state."""
    if not hasattr(runner, "model_state"):
        return V1View(runner, states)
    from steering.worker.runners.v2 import V2View

    return V2View(runner)
