"""Vectors inside the engine: exact against `transformers` with hooks, wherever they act.

They share batches with each other, with LoRA, DoRA and a pack, and with rows that have none. The
engine has too few blocks for the larger tests, so requests are preempted; prompts are longer than
a step, so they are read in chunks.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.formats.base import base_shapes
from steering.engine_args import adapter_engine_args
from steering.errors import BadValue
from tests.adapters import kinds
from tests.adapters.kinds import lora
from tests.adapters.make import make_native
from tests.adapters.vectors import make_reft, make_vector, write
from tests.engine.driver import BLOCK, Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE, assert_exact, prompt
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine

GUIDANCE: Mapping[str, object] = {"method": "guidance", "negative": "twin", "strength": 1.4}
MIX: Mapping[str, object] = {"method": "mix", "weights": {"base": 0.6, "opt": 0.5, "plain": -0.4}}

F7L7 = {"prompt_first": 7, "prompt_last": 7, "halved": True}
ITI = {"prompt_last": 1, "from": 0}
WHERES: list[Any] = [
    "all", "prompt", "reply", "last_prompt", {"from": 3}, {"first": 2}, {"from": 1, "first": 4},
    {"prompt_first": 5, "prompt_last": 3}, F7L7, ITI,
]  # fmt: skip


def hidden(folder: Path) -> tuple[int, int]:
    """(H, decoder layers) of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    layers = config.get("num_hidden_layers") or config["n_layer"]
    return config.get("hidden_size") or config["n_embd"], layers


def make_heads(folder: Path, base: Path) -> Path:
    """LoFiT on every head of layer 0: one A for the heads that share a value, any v."""
    random_, shapes = torch.Generator().manual_seed(9), base_shapes(base)
    module = "model.layers.0.self_attn.o_proj"
    linear, values = shapes.linear(module), shapes.linear("model.layers.0.self_attn.v_proj")
    assert linear is not None and values is not None
    config = json.loads((base / "config.json").read_text())
    size = linear[1] // config["num_attention_heads"]
    a = 0.5 * torch.randn(values[0] // size, 1, size, generator=random_)
    scale = a.expand(-1, linear[1] // values[0], -1).reshape(-1)
    shift = 0.3 * torch.randn(linear[1], generator=random_)
    write(folder / "shift", {f"{module}.shift": shift})
    return write(folder, {f"{module}.heads": scale, f"{module}.shift": shift}, head_size=size)


def make_vectors(folder: Path, engine: Engine) -> None:
    """Vectors of the base and of its companions."""
    base = engine.folders["base"]
    width, layers = hidden(base)
    every = range(layers)
    made = {
        "vector": make_vector(folder / "vector", width, every, seed=1),
        "late": make_vector(folder / "late", width, [layers - 1], seed=2, scale=2.0, where="reply"),
        "reft": make_reft(folder / "reft", width, every, seed=3, where=F7L7),
        "reft-all": make_reft(folder / "reft-all", width, [0], seed=4, rank=5),
        "heads": make_heads(folder / "heads", base),
        "shift": folder / "heads" / "shift",
    }
    engine.load_adapters(made)
    for stream in ("opt", "plain"):
        width, layers = hidden(engine.folders[stream])
        own = {
            f"{stream}-vector": make_vector(folder / f"{stream}-v", width, range(layers), seed=8),
            f"{stream}-reft": make_reft(folder / f"{stream}-r", width, [layers - 1], seed=9),
        }
        engine.load_adapters(own, stream)


def make_others(folder: Path, engine: Engine) -> None:
    """Adapters of other kinds."""
    base = engine.folders["base"]
    made = {
        "lora": kinds.make(kinds.Case("lora", lora()), folder / "lora", base, seed=5),
        "dora": kinds.make(kinds.Case("d", lora(use_dora=True)), folder / "dora", base, seed=6),
        "pack": make_native(folder / "pack", base, tasks=3, seed=7),
    }
    engine.load_adapters(made)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A base with companions of other kinds of layers, and a twin; slots for four sets."""
    folder = tmp_path_factory.mktemp("models")
    streams: dict[str, tuple[str, int] | str] = {
        "opt": ("opt", VOCAB_SIZE),
        "plain": ("gpt2", VOCAB_SIZE),
        "twin": "base",
    }
    slots = {**adapter_engine_args(4, 48), "max_cpu_loras": 6, "num_gpu_blocks_override": 24}
    found = Engine(folder, ("qwen2", VOCAB_SIZE), streams, vectors=True, **slots)
    make_vectors(folder, found)
    make_others(folder, found)
    yield found
    del found
    gc.collect()


Asked = tuple[Mapping[str, object] | None, tuple[Use, ...]]

ALONE: list[tuple[Use, ...]] = [
    (Use(name),) for name in ("vector", "late", "reft", "reft-all", "heads")
]
PLACED: list[tuple[Use, ...]] = [
    *((Use("vector", where=json.dumps(where)),) for where in WHERES),
    *((Use("lora", where=json.dumps(where)),) for where in ("reply", "prompt", F7L7)),
    (Use("dora", 0.7, where='"last_prompt"'), Use("vector", 0.5)),
    (Use("pack", where='"reply"'), Use("reft", -0.5, where='{"from": 2}')),
    (Use("shift", where=json.dumps(ITI)), Use("late", -1.0)),
]
MIXED: list[tuple[Use, ...]] = [
    (Use("vector", -0.6), Use("lora", 0.8)),
    (Use("reft"), Use("dora"), Use("late", 0.5)),
    (Use("vector", 0.3), Use("pack", 0.8, top_k=2)),
    (Use("reft-all", 0.5), Use("vector", 0.5), Use("reft", 2.0)),
    (Use("heads", -0.5), Use("vector", 0.5)),
]
STEERED: list[Asked] = [
    (GUIDANCE, (Use("vector", stream="twin"), Use("reft"))),
    (GUIDANCE, (Use("late", stream="twin", where='{"first": 3}'), Use("vector", where='"reply"'))),
    (MIX, (Use("opt-vector", stream="opt"), Use("plain-reft", stream="plain"), Use("vector"))),
    (MIX, (Use("opt-reft", stream="opt", where='"prompt"'), Use("plain-vector", 0.5, "plain"))),
]  # fmt: skip


def batch(seed: int, asked: Sequence[Asked], longest: int = 120) -> list[Case]:
    """Requests that join and leave at different steps; some prompts are read in chunks."""
    rng = random.Random(seed)
    return [
        Case(prompt(rng, 3, longest), spec, {}, rng.randint(5, 9), rng.randrange(9), adapters=own)
        for spec, own in asked
    ]


def test_each_vector_alone_is_the_formula(engine: Engine) -> None:
    cases = batch(1, [(None, own) for own in ALONE])
    assert_exact(engine, cases, engine.run(cases))


def test_adapters_act_where_they_are_told(engine: Engine) -> None:
    cases = batch(2, [(None, own) for own in PLACED])
    assert_exact(engine, cases, engine.run(cases))


def test_vectors_share_batches_with_everything_else(engine: Engine) -> None:
    asked: list[Asked] = [*((None, own) for own in (*MIXED, ())), *STEERED]
    own = {"twin": prompt(random.Random(0), 40, 60)}
    cases = batch(3, asked)
    cases += [Case(c.prompt, c.spec, own, 6, 2, adapters=c.adapters)
              for c in cases if c.spec is GUIDANCE]  # fmt: skip
    assert_exact(engine, cases, engine.run(cases))


def test_preempted_requests_read_their_reply_as_a_reply(engine: Engine) -> None:
    before = engine.preemptions()
    cases = [Case(c.prompt, None, {}, BLOCK, adapters=c.adapters)
             for c in batch(4, [(None, own) for own in PLACED], 150)]  # fmt: skip
    assert_exact(engine, cases, engine.run(cases))
    assert engine.preemptions() > before


def test_everything_changes_the_answers(engine: Engine) -> None:
    """Else the tests above could pass with vectors that do nothing."""
    ids = prompt(random.Random(5), 30, 30)
    uses = [(), *ALONE, *(one for one in PLACED if one != (Use("vector", where='"all"'),))]
    found = [logprobs(o) for o in engine.run([Case(ids, adapters=own) for own in uses])]
    for i, one in enumerate(found):
        for j in range(i):
            assert one != pytest.approx(found[j], abs=10 * TOLERANCE), (uses[i], uses[j])


def test_the_next_turn_of_a_conversation(engine: Engine) -> None:
    """Its prompt has the reply in it, whose blocks must not answer: there the vector acted."""
    rng = random.Random(6)
    for where in ("reply", "prompt", {"from": 1}, {"prompt_last": 40}, F7L7, "all"):
        use = Use("vector", where=json.dumps(where))
        first = Case(prompt(rng, 40, 40), max_tokens=2 * BLOCK + 9, adapters=(use,))
        (output,) = engine.run([first], salt="turns")
        ids = [*first.prompt, *tokens(output), *prompt(rng, 5, 5)]
        second = Case(ids, max_tokens=5, adapters=(use,))
        (answer,) = engine.run([second], salt="turns")
        assert_exact(engine, [first, second], [output, answer])
        assert answer.num_cached_tokens == {"all": 96, "prompt": 32, "reply": 32}.get(
            str(where), answer.num_cached_tokens)  # fmt: skip


def test_prefixes_are_shared_only_under_the_same_positions(engine: Engine) -> None:
    ids = prompt(random.Random(7), 100, 100)
    for where in ("reply", "all", "last_prompt", F7L7):
        case = Case(ids, max_tokens=4, adapters=(Use("vector", where=json.dumps(where)),))
        cold, warm = (engine.run([case], salt="hits")[0] for _ in range(2))
        assert cold.num_cached_tokens == 0
        assert warm.num_cached_tokens >= 2 * BLOCK
        assert_exact(engine, [case, case], [cold, warm])


def test_several_choices_and_seeds(engine: Engine) -> None:
    drawn = {"temperature": 1.0, "seed": 3, "n": 2}
    ids = prompt(random.Random(8), 20, 20)
    case = Case(ids, max_tokens=6, adapters=(Use("late"),), params=drawn)
    one, two = engine.run([case, case])
    for i in (0, 1):
        assert tokens(one, i) == tokens(two, i)
        drawn_ids = iter(tokens(one, i))
        steps = engine.reference(case, choose=lambda _, ids=drawn_ids: next(ids))
        assert logprobs(one, i) == pytest.approx([s.logprob for s in steps], abs=TOLERANCE)


def test_values_are_scaled_everywhere_or_not_at_all(engine: Engine) -> None:
    """Later positions read the values, which an adapter of some positions must not change."""
    with pytest.raises(BadValue, match=r"adapters\.where: .*attention heads"):
        engine.add(Case([5, 6], adapters=(Use("heads", where='"reply"'),)))
