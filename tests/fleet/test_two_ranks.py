"""Two ranks of one engine: adapters of every kind, packs, vectors, taps, heads, values, drafts.

The same cases as in `tests/engine`, held to the same references.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import OPTConfig

from adapters.formats.base import base_shapes
from steering.engine_args import Speculation, StreamSource, adapter_engine_args
from steering.worker.adapting.base_layers import EngineLayers
from tests.adapters import kinds
from tests.adapters.layers import CheckpointLayers
from tests.engine import test_adapter_kinds as adapter_kinds
from tests.engine import test_heads as heads
from tests.engine import test_speculation as speculation
from tests.engine import test_vectors as vectors
from tests.engine.driver import BLOCK, ERRORS, ON_V2, STREAMS, Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE, assert_exact, prompt
from tests.injected import Injected, failing, filled
from tests.models import ARCHITECTURES, MAX_LENGTH, VOCAB_SIZE

pytestmark = [pytest.mark.nightly, pytest.mark.engine, pytest.mark.timeout(900)]

TWO: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}

TAPS = {
    "early": StreamSource(on="base", layer=1, norm=True),
    "raw": StreamSource(on="base", layer=2, norm=False),
    "opt-early": StreamSource(on="opt", layer=1, norm=True),
}


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if os.environ.get("VLLM_CPU_OMP_THREADS_BIND") is None:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield


def _opt(**common: Any) -> OPTConfig:
    """Four heads: three cannot be split."""
    return OPTConfig(
        hidden_size=128, word_embed_proj_dim=128, ffn_dim=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, **common,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A base with biases, companions with biases and with fused layers, and a twin."""
    folder = tmp_path_factory.mktemp("models")
    streams: dict[str, tuple[str, int] | str] = {
        "opt": ("opt", VOCAB_SIZE),
        "plain": ("gpt2", VOCAB_SIZE),
        "twin": "base",
    }
    slots = {**adapter_engine_args(4, 48), "max_cpu_loras": 6}
    with patch.dict(ARCHITECTURES, opt=_opt):
        more = {**slots, **TWO, "vectors": True}
        found = Engine(folder, ("qwen2", VOCAB_SIZE), streams, taps=TAPS, **more)
    made = {
        "base": adapter_kinds.BASE,
        "opt": adapter_kinds.COMPANION,
        "plain": adapter_kinds.FUSED,
    }
    for seed, (stream, configs) in enumerate(made.items()):
        base = found.folders[stream]
        folders = {
            name: kinds.make(kinds.Case(name, config), folder / name, base, seed=10 * seed + i)
            for i, (name, config) in enumerate(configs.items())
        }
        if stream == "base":
            folders["pack"] = adapter_kinds.make_pack(folder / "pack", base)
        found.load_adapters(folders, stream)
    vectors.make_vectors(folder / "vectors", found)
    yield found
    found.llm.llm_engine.engine_core.shutdown()
    del found
    gc.collect()


def test_the_runner(engine: Engine) -> None:
    """`tests/test_emulated.py` runs all of this on V2."""

    def module(worker: Any) -> str:
        return " ".join(c.__module__ for c in type(worker.model_runner).__mro__)

    modules = engine.llm.collective_rpc(module)
    assert [".gpu.model_runner" in found for found in modules] == [ON_V2, ON_V2], modules


def test_adapters_of_every_kind(engine: Engine) -> None:
    asked: list[adapter_kinds.Asked] = [
        *((None, (Use(name),)) for name in adapter_kinds.ALONE),
        *((None, own) for own in adapter_kinds.MIXES),
        (None, ()),
        *adapter_kinds.STEERED,
    ]
    cases = adapter_kinds.batch(1, asked)
    assert_exact(engine, cases, engine.run(cases))
    print(f"\ntwo ranks: {len(cases)} requests with adapters, largest error {max(ERRORS):.1e}")


def test_vectors_wherever_they_act(engine: Engine) -> None:
    """What is behind a decoder layer is whole on each rank; what is in front of o_proj is split."""
    asked: list[vectors.Asked] = [
        *((None, own) for own in (*vectors.ALONE, *vectors.PLACED, *vectors.MIXED, ())),
        *vectors.STEERED,
    ]
    cases = vectors.batch(2, asked)
    assert_exact(engine, cases, engine.run(cases))
    print(f"\ntwo ranks: {len(cases)} requests with vectors, largest error {max(ERRORS):.1e}")


def test_taps(engine: Engine) -> None:
    rng = random.Random(8)
    specs: list[dict[str, Any] | None] = [
        {"method": "dola", "layers": ["early", "raw"]},
        {"method": "sled", "layers": ["early"], "top_k": 7},
        {"method": "contrastive", "amateur": "raw", "strength": 0.4},
        {"method": "mix", "weights": {"base": 1.0, "early": -0.3, "opt-early": 0.4}},
        None,
    ]
    cases = [Case(prompt(rng, 5, 120), spec, max_tokens=6, adapters=own)
             for spec in specs for own in ((), (Use("vector", 0.5),))]  # fmt: skip
    assert_exact(engine, cases, engine.run(cases))


def path(engine: Engine, *names: str) -> str:
    """Of a set of the base's adapters."""
    _, found = engine.adapted(Case([1], adapters=[Use(name) for name in names]))
    assert found is not None
    return str(found.lora_request()["lora_path"])


@pytest.mark.parametrize("stream", ["base", "opt", "plain"])
def test_ranks_know_their_rows_of_the_base(engine: Engine, stream: str) -> None:
    """Of a layer whose rows are split each rank knows its own; of others, all."""
    folder = engine.folders[stream]
    known = CheckpointLayers(folder)
    names = [name.removesuffix(".weight") for name in base_shapes(folder).tensors]
    modules = [name for name in names if "norm" not in name and known.linear(name) is not None]
    draw = torch.Generator().manual_seed(1)
    inputs = {m: torch.randn(3, (known.linear(m) or (0, 0))[1], generator=draw) for m in modules}

    def look(worker: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        layers = EngineLayers(worker.model_runner.lora_manager._adapter_manager, stream, {})
        return {m: (layers.product(m, x), layers.row_norms(m), layers.bias(m))
                for m, x in inputs.items()}  # fmt: skip

    first, second = engine.llm.collective_rpc(look)
    split = 0
    for module, x in inputs.items():
        right = known.product(module, x), known.row_norms(module), known.bias(module)
        for want, *found, other in zip(
            right, first[module], second[module], (0, 1, 0), strict=True
        ):
            if want is None:
                assert found == [None, None]
                continue
            whole = [torch.isclose(own, want, rtol=1e-4, atol=1e-5) for own in found]
            rest = [own == other for own in found]
            assert (whole[0] | whole[1]).all(), module
            assert all((a | b).all() for a, b in zip(whole, rest, strict=True)), module
            split += not whole[0].all()
    assert split > len(modules) // 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_fails_on_one_rank_fails_on_all(engine: Engine, rank: int) -> None:
    """Neither waits for the other, nothing is left, and whoever tries again gets it all."""
    asked = path(engine, "dora", "pack", "biases")

    def fail(worker: Any, after: int) -> list[Any]:
        manager = worker.model_runner.lora_manager
        mine = worker.rank == rank
        found = []
        with failing(manager, "read", after, Injected("here")) if mine else nullcontext():
            found.append(worker.coxswain_load(asked))
            while "done" in (one := worker.coxswain_read_ahead(asked, 0.0)):
                assert not one["done"]
        worker.coxswain_unload(asked)
        return [*found, one, len(manager.list_adapters()), len(manager._ahead), filled(manager)]

    for set_id in engine.llm.llm_engine.list_loras():
        engine.llm.llm_engine.remove_lora(set_id)
    for after in (0, 5, 20):
        told = engine.llm.collective_rpc(fail, args=(after,))
        for number, (*errors, sets, ahead, slots) in enumerate(told):
            kind, text = ("ServerFault", "Injected: here") if number == rank else ("RankFault", "")
            for one in errors:
                assert one["error"]["kind"] == kind and text in one["error"]["text"]
            assert (sets, ahead, slots) == (0, 0, [])
    case = Case(prompt(random.Random(7), 20, 40), adapters=[Use(n) for n in ("dora", "pack")])
    assert_exact(engine, [case], engine.run([case]))


def test_sets_that_are_read_ahead_are_the_same(engine: Engine) -> None:
    """However fast each rank reads."""
    adapter_kinds.test_sets_that_are_read_ahead_are_the_same(engine)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """All companions, heads of every kind, and a companion that drafts."""
    with patch.dict(ARCHITECTURES, opt=_opt):
        found = Engine(
            tmp_path_factory.mktemp("models"),
            ("llama", VOCAB_SIZE + 12),
            STREAMS,
            heads.make_heads,
            speculation=Speculation("chat", speculation.DRAFTS),
            **TWO,
        )
    yield found
    found.llm.llm_engine.engine_core.shutdown()
    del found
    gc.collect()


def test_values_and_critical_tokens(steered: Engine) -> None:
    heads.test_values_beside_all_other_methods(steered, own=True)
    heads.test_critical_tokens_beside_all_other_methods(steered, own=False)
    heads.test_prefix_cache_hits_of_values(steered)
    heads.test_candidates_at_the_border_of_a_block(steered, BLOCK)


def test_drafts(steered: Engine) -> None:
    speculation.test_mixed_batches_with_joins_and_leaves(steered, own=True)
    speculation.test_reports_count_drawn_tokens_only(steered)
    speculation.test_prefix_cache_hits_and_chunked_prompts(steered)
    speculation.test_a_seed_gives_the_same_reply_again(steered)
    speculation.test_penalties_act_on_the_steered_scores(steered)


@pytest.mark.parametrize("seed", [None, 5])
def test_every_rank_draws_the_same(steered: Engine, seed: int | None) -> None:
    """Else a rank would go on from a token that was not drawn, and scores would be others."""
    rng = random.Random(60)
    specs = (None, speculation.CLOSE, speculation.SAME, heads.PROXY, heads.GUIDED)
    params = {"temperature": 1.0, "seed": seed}
    cases = [Case(prompt(rng, 5, 60), s, max_tokens=24, params=params) for s in specs]
    before = speculation.accepted(steered)
    outputs = steered.run(cases)
    assert speculation.accepted(steered)[1] > before[1]
    for case, output in zip(cases, outputs, strict=True):
        drawn = iter(tokens(output))
        steps = steered.reference(case, choose=lambda _, drawn=drawn: next(drawn))
        want = [step.logprob for step in steps]
        assert logprobs(output) == pytest.approx(want, abs=TOLERANCE)
        ERRORS.extend(abs(a - b) for a, b in zip(logprobs(output), want, strict=True))
    print(f"\ntwo ranks: {len(ERRORS)} log-probabilities, largest error {max(ERRORS):.1e}")
