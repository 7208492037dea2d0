"""The steered model: a base and its streams as one vLLM model class.

vLLM sees one model with more attention layers, so its scheduler, paged KV cache, prefix caching,
speculation, structured output and sampler work on it unchanged. Lives in the worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from vllm.config import VllmConfig

from steering.engine_args import SCRATCH, watched
from steering.worker import heads, lora_seam, lora_sets, overlaps
from steering.worker import vllm_seam as seam
from steering.worker.adapting import Adapted
from steering.worker.batches import (
    Candidates,
    Int32,
    Int64,
    Step,
    StreamBatch,
    stream_batch,
)
from steering.worker.drafting import Drafting
from steering.worker.ends import EndSets
from steering.worker.layout import Layout
from steering.worker.one_product import OneProduct, one_product
from steering.worker.readout import Readout
from steering.worker.reporter import Reporter
from steering.worker.seats import SeatBook, Tables
from steering.worker.speculation_seam import SpeculationSeam
from steering.worker.streams import Streams, hidden_width
from steering.worker.triton_readout import readout_class
from steering.worker.values import ValueStreams, candidates_of
from steering.worker.watch import Watch


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
        self._sources: dict[str, dict[str, str]] = settings["streams"]
        streams = Streams(self, self._sources, vllm_config)
        self._streams, self.names, self._forwards = streams, streams.names, streams.models
        self.config = self.base.config
        self._widths = {n: hidden_width(m) for n, m in zip(self.names, self._forwards, strict=True)}
        self._sums: list[list[str]] = settings["one_product"]
        built = heads.build(
            self._sources, self._widths, vllm_config.model_config.hf_config.vocab_size
        )
        self.heads = {n: h for n, h in built.items() if self._sources[n]["head"] == "classifier"}
        self._value_heads = {n: h for n, h in built.items() if n not in self.heads}
        self._readout = self._build_readout(settings, vllm_config)
        self._values = self._build_values(settings["top_k"], vllm_config)
        # Index of the stream that drafts, 0 without speculation.
        self._draft = self.names.index(settings["draft"] or self.names[0])
        self._drafting: Drafting | None = None
        self._seam: seam.Seam | None = None
        self._lora: lora_seam.LoraSeam | None = None
        self._lora_manager: Any = None
        self._adapted: Adapted | None = None
        own = self._readout.ends.own
        self._seats = SeatBook(self.names, tuple(self.heads), own, self.is_hybrid)
        self._active = [True] * len(self.names)
        self._special, self._even = True, False
        readings = dict(zip(built, heads.readings(self._sources, self.names, built), strict=True))
        self._reporter = Reporter(self.names, self._readout.layout, readings)
        self.reports = self._reporter.book
        self.steps = 0
        self.passes = dict.fromkeys(self.names, 0)
        self.tokens = dict.fromkeys(self.names, 0)
        lora_seam.prepare(self, vllm_config)

    def _build_readout(self, settings: dict[str, Any], vllm_config: VllmConfig) -> Readout:
        candidates = settings["top_k"] if self._value_heads else 0
        bodies = {name for name, source in self._sources.items() if "head" in source}
        pairs = zip(self.names, self._forwards, strict=True)
        unembed = [None if n in bodies else m.compute_logits for n, m in pairs]
        return readout_class()(
            Layout(tuple(self._widths.values()), vllm_config.model_config.dtype, candidates),
            unembed,
            overlaps.vocabularies(self.names, self._streams.original, settings["overlaps"]),
            overlaps.padded(settings["overlaps"]),
            heads.readings(self._sources, self.names, self.heads),
            EndSets(settings["ends"], vllm_config.model_config.get_vocab_size()),
            Watch(watched(self._sources)),
        )

    def _build_values(self, top_k: int, vllm_config: VllmConfig) -> ValueStreams:
        index = {name: self.names.index(name) for name in self._value_heads}
        most = vllm_config.scheduler_config.max_num_batched_tokens
        return ValueStreams(
            {index[name]: head for name, head in self._value_heads.items()},
            index,
            {i: self._readout.vocabularies[i].read_as for i in index.values()},
            min(SCRATCH * top_k, most),
        )

    def bind(self, runner: Any) -> None:
        """Hands over the model runner, once its KV cache is there."""
        self._seam = seam.Seam(runner, self._streams.layers())
        self._lora = lora_seam.LoraSeam(runner) if runner.lora_config else None
        if self._draft:
            model, speculative = runner.vllm_config.model_config, runner.speculative_config
            self._drafting = Drafting(
                self._draft,
                speculative.num_speculative_tokens,
                model.max_model_len,
                partial(self._draft_scores, size=model.get_vocab_size()),
                SpeculationSeam(runner),
            )
        self._readout = replace(self._readout, one_product=self._one_product(runner))
        for stream in self._values.heads:
            self._seam.add_scratch(stream, self._values.chunk)
        seam.tell_faults(runner, self._readout.watch)

    def _one_product(self, runner: Any) -> OneProduct | None:
        """Not for tables that are split over ranks; side by side where that was measured."""
        if runner.vllm_config.parallel_config.tensor_parallel_size > 1:
            return None
        whole = [u is not None for u in self._readout.unembed]
        sums = self._sums if runner.device.type == "cpu" else []
        indices = [[self.names.index(name) for name in names] for names in sums]
        return one_product(self._readout.layout, self._forwards, whole, indices)

    # --- what vLLM calls ------------------------------------------------------------------------

    @property
    def adapted_streams(self) -> dict[str, Any]:
        """The streams that own their weights, and their models."""
        pairs = zip(self.names, self._forwards, strict=True)
        return {n: m for n, m in pairs if self._streams.original[n] == n}

    @property
    def lora_manager(self) -> Any:
        """What vLLM manages the LoRA slots with; it sets this when it has wrapped the layers."""
        return self._lora_manager

    @lora_manager.setter
    def lora_manager(self, manager: Any) -> None:
        self._lora_manager = manager
        lora_sets.arrange(manager)

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
        if self._seam is None or not self._seam.scheduled:
            return self._forward_all(input_ids, positions, inputs_embeds)
        self._readout.watch.forget()
        self._seam.hold_generators()
        tables = self._seats.update(self._seam.request_ids(), self._seam.freight)
        self._readout.ends.show(tables.ends)
        counting = bool(tables.tagged)
        self._adapted = self._lora.adapted(tables.adapters, counting) if self._lora else None
        self.steps += 1
        if not tables.steered:
            self._count(0, positions.shape[0])
            with self._adapting(0, None, positions):
                return self._run(0, input_ids, positions, inputs_embeds)
        return self._forward_steered(tables, input_ids, positions)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[R, V] scores of the steered model, a pure function of the rows."""
        if hidden.shape[-1] == self._readout.layout.sizes[0]:
            return self._readout.watch.base(self._forwards[0].compute_logits(hidden))
        if self._even and not self._reporter.waits:
            z = self._readout.in_one(hidden, self._active)
            if z is not None:
                return z
        mixed = self._readout(hidden, self._active, self._special, self._even)
        if self._reporter.waits:
            choices = partial(self._readout.choices, hidden, active=self._active)
            self._reporter.measure(mixed, hidden, choices, self._readout.watch)
        return None if mixed is None else mixed.z

    def draft(self, rows: Int64, newest: Int64, token_ids: Int32) -> dict[int, list[int]]:
        """Drafts what may follow the step that was run last; see `Drafting`."""
        assert self._seam is not None and self._drafting is not None
        sound = ~np.isin(rows, [*self._readout.watch.at_fault])
        rows, newest, token_ids = rows[sound], newest[sound], token_ids[sound]
        tables = self._seats.update(self._seam.request_ids(), self._seam.freight)
        found = self._drafting(tables, rows, newest, token_ids)
        for row, seat in tables.tagged:
            if row in found:
                choice = seam.choice_of(self._seam.request_ids()[row])
                tally = self._reporter.book.tally(seat.tag, choice)
                tally.run([self.names[self._draft]], len(found[row]))
        return found

    # --- one step -------------------------------------------------------------------------------

    def _forward_all(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        layout = self._readout.layout
        self._active, self._special, self._even = [True] * layout.streams, True, False
        hidden = self._run(0, input_ids, positions, inputs_embeds)
        if layout.streams == 1:
            return hidden
        out = hidden.new_zeros(positions.shape[0], layout.width)
        out[:, layout.columns(0)] = hidden
        for i, name in enumerate(self.names):
            if i and self._streams.original[name] == name:
                out[:, layout.columns(i)] = self._run(i, input_ids, positions)
        return out

    def _forward_steered(
        self, tables: Tables, input_ids: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        assert self._seam is not None and input_ids is not None
        layout, step = self._readout.layout, self._seam.step()
        out = torch.zeros(
            positions.shape[0], layout.width, dtype=layout.dtype, device=positions.device
        )
        batches: dict[int, StreamBatch | None] = {}
        for i in range(layout.streams):
            like = tables.like[i]
            if tables.whole[i]:
                self._run_whole(i, int(step.starts[-1]), input_ids, positions, out)
                self._active[i] = True
                continue
            if like not in batches:
                uses, offsets = tables.uses[:, i], tables.offsets[:, i]
                batches[like] = stream_batch(step, uses, offsets, tables.prompts[i])
            batch = batches[like]
            self._active[i] = batch is not None
            if batch is not None:
                self._run_batch(i, batch, input_ids, out)
        self._special, self._even = tables.special, tables.even
        layout.write_control(out, self._control(tables, step))
        if tables.valued:
            self._add_values(tables, step, input_ids, out)
        return out

    def _add_values(
        self, tables: Tables, step: Step, input_ids: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Writes what value streams add to the rows that draw a token into `out`."""
        found, layout = self._seam, self._readout.layout
        assert found is not None
        asked = [(row, values) for row, values in tables.valued if found.samples(row)]
        if not asked:
            return
        last = found.to_device(np.array([int(step.starts[row + 1]) - 1 for row, _ in asked]))

        def hidden(stream: int) -> torch.Tensor:
            return out[last, layout.columns(stream)]

        def run(stream: int, tokens: torch.Tensor, batch: Candidates) -> torch.Tensor:
            found.begin_candidates(stream, batch)
            positions = found.to_device(batch.positions)
            with found.stream_context(stream, batch), self._adapting(stream, batch, positions):
                self._count(stream, batch.rows.size)
                return self._run(stream, tokens.to(input_ids.dtype), positions)

        scores = candidates_of(self._forwards[0].compute_logits(hidden(0)), self._readout.padded)
        ends = self._readout.ends.of(found.to_device(tables.ends_of([row for row, _ in asked])))
        note, offsets = self._readout.watch.values, tables.offsets
        add = self._values.add(asked, scores, hidden, step, offsets, run, ends, note)
        layout.write_additions(out, last, add.ids, add.added)

    def _control(self, tables: Tables, step: Step) -> npt.NDArray[np.float32]:
        """[T, S + EXTRA] the control of this step's tokens."""
        if not tables.tagged:
            self._reporter.forget()
            if int(step.starts[-1]) == len(tables.control):
                return tables.control
        control = np.repeat(tables.control, step.lengths, axis=0)
        if tables.tagged:
            assert self._seam is not None
            if self._adapted is not None:
                ids = self._seam.request_ids()
                self._reporter.routes(ids, tables, self._adapted.routed)
            self._reporter.mark(self._seam, tables, step, control)
        return control

    def _run_whole(
        self,
        i: int,
        tokens: int,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Runs stream i on all the step's tokens, into its columns of `out`."""
        assert self._seam is not None
        read_as = self._readout.vocabularies[i].read_as
        with self._seam.stream_context(i, None), self._adapting(i, None, positions):
            hidden = self._run(i, overlaps.read_as(input_ids, read_as), positions)
        out[:, self._readout.layout.columns(i)] = hidden
        self._count(i, tokens)

    def _run_batch(
        self, i: int, batch: StreamBatch, input_ids: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Runs stream i on the tokens of a batch, into its columns of their rows of `out`."""
        assert self._seam is not None
        tokens = self._seam.to_device(batch.tokens)
        token_ids = overlaps.read_as(input_ids[tokens], self._readout.vocabularies[i].read_as)
        for own in batch.own:
            overlaps.put(token_ids, own)
        positions = self._seam.to_device(batch.positions)
        with self._seam.stream_context(i, batch), self._adapting(i, batch, positions):
            hidden = self._run(i, token_ids, positions)
        out[tokens, self._readout.layout.columns(i)] = hidden
        self._count(i, batch.tokens.size)

    def _draft_scores(
        self, token_ids: torch.Tensor, batch: StreamBatch, *, size: int
    ) -> torch.Tensor:
        """[n, size] scores of the draft stream behind n requests; see `drafting.Score`."""
        assert self._seam is not None
        i, positions = self._draft, self._seam.to_device(batch.positions)
        ids = overlaps.read_as(token_ids.int(), self._readout.vocabularies[i].read_as)
        with self._seam.between_steps(i, batch), self._adapting(i, batch, positions):
            hidden = self._run(i, ids, positions)
        self._count(i, batch.rows.size)
        return self._readout.alone(i, hidden, size)

    def _adapting(
        self, i: int, batch: StreamBatch | None, positions: torch.Tensor
    ) -> AbstractContextManager[None]:
        """Makes stream i's layers add its requests' adapters; None is the step as scheduled."""
        if self._adapted is None:
            return nullcontext()
        assert self._seam is not None and self._lora is not None
        if batch is None:
            lengths = self._seam.step().lengths
            requests: Int64 = np.repeat(np.arange(lengths.size), lengths)
        else:
            requests = batch.rows[batch.token_rows]
        stream = self.names[i], self._streams.original[self.names[i]]
        total, device = positions.shape[0], positions.device
        return self._lora.adapting(self._adapted, stream, requests, total, device)

    def _run(
        self,
        i: int,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, H_i] stream i's hidden states. By keyword: models differ in what stands between."""
        hidden: torch.Tensor = self._forwards[i](
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=None,
            inputs_embeds=inputs_embeds,
        )
        return hidden

    def _count(self, i: int, tokens: int) -> None:
        self.passes[self.names[i]] += 1
        self.tokens[self.names[i]] += tokens
