"""What the passes of a step cost outside of graphs, counted: launches, copies and waits.

Streams, their models and their attention are as small as can be, for what they do lies within the
graphs. All else is the worker's own. The read-out is counted elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from vllm.distributed import parallel_state
from vllm.forward_context import (
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport

from adapters.kernels import triton_operation
from steering.plan import Values
from steering.worker.adapting import triton as triton_adding
from steering.worker.adapting.groups import Adapted
from steering.worker.adapting.lora_seam import LoraSeam
from steering.worker.adapting.triton import TritonAdding
from steering.worker.plan import ends, staging
from steering.worker.plan.batches import Schedule
from steering.worker.plan.ends import EndSets
from steering.worker.plan.layout import EXTRA, Layout
from steering.worker.plan.request_state import BatchTables, RequestState
from steering.worker.plan.staging import StagedBatch
from steering.worker.plan.step_plan import StepPlan, plan_step
from steering.worker.readout.parts import Vocabulary
from steering.worker.step import passes as step
from steering.worker.step import pieces as step_pieces
from steering.worker.step.drafting import Drafts
from steering.worker.step.graph_inputs import PIECES, Shape
from steering.worker.step.graphs import StreamGraphs
from steering.worker.step.passes import Counters
from steering.worker.step.pieces import Pieces, left_out
from steering.worker.step.run import Step
from steering.worker.step.stream_graph import Source, StreamGraph
from steering.worker.step.values import ValueStreams, gather
from tests.emulated import graphs
from tests.emulated.capture import Capture
from tests.emulated.graphs import ALLOCATIONS, CUDAGraph
from tests.steering.worker.test_adapting import SETS, SLOTS, random_uses

NAMES = ("base", "chat", "twin")
WIDTH, TABLE, BLOCKS, SIZE = 8, 40, 6, 16
DRAFTS, TOP_K = 3, 4
CPU = torch.device("cpu")


@dataclass
class Group:
    """A group of attention layers, whose backend prepares nothing."""

    layer_names: list[str]
    kv_cache_spec: Any = field(default_factory=lambda: SimpleNamespace(head_size=4))
    backend: Any = field(default_factory=lambda: SimpleNamespace(get_name=lambda: "small"))
    metadata_builders: list[Any] = field(default_factory=list)
    support: ClassVar = AttentionCGSupport.ALWAYS

    def create_metadata_builders(self, *_: Any) -> None:
        class Builder:
            @staticmethod
            def get_cudagraph_support(*_: Any) -> AttentionCGSupport:
                return Group.support

        self.metadata_builders = [Builder()]

    def get_metadata_builder(self) -> Any:
        return self.metadata_builders[0]

    def build_metadata(self, common: Any) -> Any:
        return common

    build_metadata_for_cudagraph_capture = build_metadata


class Attention:
    """What a token's attention gives is the token itself; rows are right if their tokens are."""

    impl: Any
    kv_cache = None

    def __init__(self) -> None:
        self.impl = self

    def forward(
        self, _layer: Any, query: Any, _k: Any, _v: Any, _kv: Any, metadata: Any, output: Any
    ) -> None:
        """One launch, which writes nothing for padding."""
        count = metadata.num_actual_tokens
        output[:count].copy_(query[:count])


class Model:
    """An embedding, one adapted layer, and its attention where vLLM's context has it."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        gen = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=gen)
        self.table, self.weight = draw(TABLE, WIDTH), draw(WIDTH, WIDTH)
        self.a, self.b = [draw(len(SETS), 1, 24, WIDTH)], [draw(len(SETS), 1, WIDTH, 24)]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.table.T

    def __call__(self, input_ids: Any, positions: Any, **_: Any) -> torch.Tensor:
        x = self.table[input_ids] + positions[:, None]
        y = x @ self.weight
        torch.ops.coxswain.adapter_sum(y, x, self.a, self.b, [WIDTH])
        if not is_forward_context_available():
            return y
        layer, out = get_forward_context().no_compile_layers[f"{self.name}.0"], torch.empty_like(y)
        layer.impl.forward(layer, y, y, y, layer.kv_cache, None, output=out)
        return out * 1.0


class Counted:
    """Counts what a step does outside of graphs; raises where it would wait for the device."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.replays = self.copies = 0

    def record(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        if not func.is_view and func not in ALLOCATIONS:
            self.launches[func.name()] += 1

    def constant(self, tensor: torch.Tensor) -> None:
        pass


@contextmanager
def counting() -> Iterator[Counted]:
    """Counts what is run inside."""
    found = Counted()
    capture = Capture(found)
    replay = CUDAGraph._replay

    def replayed(graph: CUDAGraph) -> None:
        found.replays += 1
        with capture.pause():
            replay(graph)

    def to_device(arrays: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, ...]:
        found.copies += 1
        with capture.pause():
            return tuple(torch.from_numpy(np.ascontiguousarray(a)).clone() for a in arrays)

    launch = graphs._launch

    def launched(*args: Any, **kwargs: Any) -> None:
        if not capture.paused:
            found.launches["triton"] += 1
        launch(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(CUDAGraph, "_replay", replayed))
        stack.enter_context(patch.object(graphs, "_launch", launched))
        for module in (staging, triton_adding, ends):
            stack.enter_context(patch.object(module, "to_device", to_device))
        capture.begin()
        stack.callback(capture.end)
        stack.enter_context(
            patch.object(torch, "from_numpy", partial(_host, capture, torch.from_numpy))
        )
        yield found


def _host(capture: Capture, from_numpy: Any, array: Any) -> torch.Tensor:
    """Memory of the host, which no operation may use."""
    with capture.pause():
        found: torch.Tensor = from_numpy(array)
    return found


class Passes:
    """A step's passes, without an engine around them.

    Args:
        sizes: padded numbers of rows that graphs are captured for.
        free: bytes of the device that are free.
        drafts: that steps verify, and `chat` draws.
        pieces: padded numbers of tokens of graphs in pieces.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        free: Callable[[], int] = lambda: 1 << 40,
        drafts: int = 0,
        pieces: Sequence[int] = (),
    ) -> None:
        triton_operation.register("CPU")
        lines, most = sizes[-1], max(sizes[-1] * (1 + drafts), *pieces, 0)
        models = [Model("base", 0), Model("chat", 1), None]
        models[2] = models[0]
        asked = ("base", "chat", "base")
        layers = [{f"{kv}.0": f"{name}.0"} for kv, name in zip(NAMES, asked, strict=True)]
        config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=64),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=most),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
        runner = SimpleNamespace(
            device=CPU,
            vllm_config=config,
            attn_groups=[[Group([f"{name}.0" for name in NAMES])]],
        )
        # Of the step as scheduled; streams have theirs from the plan.
        self.positions = torch.zeros(most, dtype=torch.int64)
        self.table = torch.arange(lines * BLOCKS, dtype=torch.int32).view(lines, BLOCKS)
        adding = TritonAdding(NAMES, CPU, most, lines, len(SETS), 24)
        seam = LoraSeam.__new__(LoraSeam)
        seam.triton = adding
        sources = [
            Source(
                name, partial(step.forward, model), layers[i], None, partial(adding.launching, name)
            )
            for i, (name, model) in enumerate(zip(NAMES, models, strict=True))
        ]
        shapes = [Shape(size, width) for width in {1, 1 + drafts} for size in sizes]
        shapes.sort(key=lambda shape: shape.tokens)
        shapes += [Shape(size, PIECES) for size in pieces]
        self.graphs = StreamGraphs(runner, [(self.table, SIZE)], [SIZE], sources, shapes)
        with patch.object(StreamGraphs, "_context", _context), _no_devices():
            self.graphs.capture(free)
        layout = Layout((WIDTH,) * 3, torch.float32, TOP_K)
        readout = SimpleNamespace(
            layout=layout,
            vocabularies=[Vocabulary()] * 3,
            padded=None,
            ends=EndSets((3,), TABLE),
            watch=SimpleNamespace(requests=lambda *_: None),
            draft_scores=lambda i, hidden, size: hidden,
        )
        cache = torch.zeros(lines * BLOCKS + 256, SIZE)

        def begin_candidates(_stream: int, batch: StagedBatch) -> None:
            """As on a GPU, for one layer."""
            blocks = self.table[batch.rows, batch.positions // SIZE].long()
            gather(cache, cache[-256:], blocks)

        contexts = SimpleNamespace(scratch=0, device=CPU, begin_candidates=begin_candidates)
        values = ValueStreams({1: lambda h: h.sum(-1)}, {"chat": 1}, {1: None}, 256, TABLE)
        none = dict.fromkeys(NAMES, 0)
        original = {"base": "base", "chat": "chat", "twin": "base"}
        self.step = Step(
            names=NAMES,
            original=original,
            models=models,
            readout=readout,  # type: ignore[arg-type]
            contexts=contexts,  # type: ignore[arg-type]
            adapters=seam,
            counters=Counters(dict(none), dict(none)),
            graphs=self.graphs,
            values=values,
        )
        self.step.drafts = Drafts(1, drafts, 64, TABLE) if drafts else None

    @torch.inference_mode()
    def run(
        self, plan: StepPlan, ids: torch.Tensor, adapted: Adapted | None = None
    ) -> torch.Tensor:
        """The hidden states of a step."""
        self.step.adapted, self.step._schedule = adapted, plan.schedule
        self.step._drafting = None
        positions = self.positions[: ids.shape[0]]
        control = np.repeat(plan.tables.control, plan.schedule.lengths, axis=0)
        seen: Any = SimpleNamespace(attn_metadata={}, no_compile_layers={})
        with override_forward_context(seen):
            if not plan.tables.steered:
                return self.step.base(ids, positions, None, staging.Staging())
            return self.step.steered(plan, ids, positions, control, staging.Staging())


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _context(
    _: Any, stream: StreamGraph, metadata: Any, shape: Shape, graph: Any = None
) -> Iterator[None]:
    """What a capture sees: attention that is left out. Whole graphs have none."""
    if not isinstance(graph, Pieces):
        yield
        return
    names = [name for group in stream.groups for _, name in group.layers.layers]
    layers = {name: left_out(Attention(), name, graph) for name in names}
    seen: Any = SimpleNamespace(no_compile_layers=layers, attn_metadata={})
    with override_forward_context(seen):
        yield


@contextmanager
def _no_devices() -> Iterator[None]:
    """Nothing of CUDA's that a capture asks for, beside graphs."""
    platform = type(current_platform)
    with (
        patch.object(parallel_state, "graph_capture", lambda **_: _nothing()),
        patch.object(platform, "get_global_graph_pool", lambda _: None),
        patch.object(step_pieces, "weak_ref_tensor", graphs.weak_ref),
    ):
        yield


def request(
    weights: Mapping[int, float], own: int = 0, values: Values | None = None
) -> RequestState:
    """A request that sums some streams; its twin lags by `own` tokens."""
    control = np.zeros(len(NAMES) + EXTRA, np.float32)
    uses, offsets = np.zeros(len(NAMES), np.bool_), np.zeros(len(NAMES), np.int32)
    for stream, weight in weights.items():
        control[stream], uses[stream] = weight, True
    offsets[2] = own
    prompts, added = (None,) * len(NAMES), () if values is None else (values,)
    return RequestState(control, uses, offsets, prompts, values=added)


ALL = {0: 1.0, 1: 0.5, 2: -0.5}
MIXED = (({0: 1.0}, 0), ({0: 1.0, 1: 0.7}, 0), ({0: 1.0, 2: -0.4}, 3), ({1: 1.0, 2: 0.2}, 2))
BATCHES: dict[str, Callable[[int], RequestState]] = {
    "plain": lambda _: request({0: 1.0}),
    "pure": lambda _: request(ALL),
    "mixed": lambda row: request(*MIXED[row % len(MIXED)]),
}


def valued(_: int) -> RequestState:
    """A request whose candidates `chat` values."""
    return request({0: 1.0, 1: 0.0}, values=Values((("chat", 1.0),), TOP_K))


def plan_of(states: Sequence[RequestState], computed: int, drafts: int = 0) -> StepPlan:
    """A step in which every request decodes one token, and verifies some."""
    count = len(states)
    schedule = Schedule(
        [str(i) for i in range(count)],
        np.arange(0, count * (1 + drafts) + 1, 1 + drafts, dtype=np.int32),
        np.full(count, computed, np.int32),
        np.ones(count, np.bool_),
        np.full(count, drafts, np.int32),
    )
    return plan_step(schedule, BatchTables.of(states))


PART = 12
"""Tokens of a prompt, or of a part of one."""


def prompts_of(states: Sequence[RequestState], computed: int) -> StepPlan:
    """A step in which one in four requests reads a part of its prompt, and the others decode."""
    lengths = [PART if row % 4 == 2 else 1 for row in range(len(states))]
    plan = plan_of(states, computed)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return plan_step(replace(plan.schedule, starts=starts), plan.tables)


def adapters_of(count: int, random: Any) -> Adapted:
    """Adapters of some requests; every third has none."""
    layouts = {i: {o: s.layout(o) for o in s.owners} for i, s in SETS.items()}
    sets = np.array([0 if i % 3 == 2 else random.choice([*SETS]) for i in range(count)], np.int64)
    uses = [random_uses(random, SETS[int(s)]) if s else () for s in sets]
    return Adapted(uses, sets, SLOTS, layouts)


def again(plan: StepPlan) -> StepPlan:
    """The same requests one step later."""
    schedule = replace(plan.schedule, computed=plan.schedule.computed + 1)
    return plan_step(schedule, plan.tables)
