"""Conditional vectors inside the engine: exact against `transformers` with hooks that count.

They share batches with vectors, LoRA and plain rows. The engine has too few blocks for the larger
tests, so requests are preempted; prompts are longer than a step, so they are read in chunks.
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

from adapters.kernels.reference import similarity
from steering.engine_args import adapter_engine_args
from steering.errors import BadValue
from tests.adapters import kinds
from tests.adapters.kinds import lora
from tests.adapters.vectors import condition_vector, make_conditional, make_vector
from tests.engine.driver import BLOCK, Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE, assert_exact, prompt
from tests.engine.test_vectors import GUIDANCE, hidden
from tests.models import VOCAB_SIZE
from tests.reference import load

pytestmark = pytest.mark.engine

PROJECTED = ["mean", "last", "either", "below"]
NAMES = [*PROJECTED, "cosine", "token", "late-token"]


def thresholds(base: Path, layer: int, *, last: bool) -> tuple[float, float]:
    """Medians of the projected similarity and of the cosine, of some prompts' states."""
    rng, model = random.Random(0), load(base)
    found = []
    for _ in range(15):
        ids = torch.tensor([prompt(rng, 3, 120)])
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]
        u = (states[0, -1] if last else states[0].mean(0)).double().numpy()
        c = condition_vector(u.size, layer).double().numpy()
        found.append([similarity(u, c, projected=p) for p in (True, False)])
    medians = torch.tensor(found).median(0).values.tolist()
    return medians[0], medians[1]


def make_all(folder: Path, base: Path) -> dict[str, Path]:
    width, layers = hidden(base)
    last = layers - 1
    mean, cosine = thresholds(base, 0, last=False)
    at_end, token = thresholds(base, 0, last=True)
    prompted = {"gate": "prompt", "read": "mean", "similarity": "projected"}
    tokenwise = {"gate": "token", "similarity": "cosine"}

    def make(
        name: str, condition: dict[int, dict[str, float]], behind: Sequence[int], **more: Any
    ) -> Path:
        return make_conditional(folder / name, width, behind, condition, seed=len(name), **more)

    every = range(layers)
    return {
        "mean": make("mean", {0: {"above": mean}}, every, **prompted),
        "last": make("last", {0: {"above": at_end}}, every, **{**prompted, "read": "last"}),
        "either": make("either", {0: {"above": 0.9}, 1: {"above": mean}}, [last], **prompted),
        "below": make("below", {0: {"below": mean}}, every, **prompted, where={"from": 1}),
        "cosine": make("cosine", {0: {"above": cosine}}, every,
                       **{**prompted, "similarity": "cosine"}),
        "token": make("token", {0: {"above": token}}, every, **tokenwise),
        "late-token": make("late-token", {0: {"above": 0.2}, 1: {"below": -0.1}}, [last],
                           gate="token", similarity="cosine", where="reply", scale=2.0),
        "vector": make_vector(folder / "vector", width, every, seed=1),
        "lora": kinds.make(kinds.Case("lora", lora()), folder / "lora", base, seed=5),
    }  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("models")
    slots = {**adapter_engine_args(4, 48), "max_cpu_loras": 6, "num_gpu_blocks_override": 24}
    streams: dict[str, tuple[str, int] | str] = {"opt": ("opt", VOCAB_SIZE), "twin": "base"}
    found = Engine(folder, ("qwen2", VOCAB_SIZE), streams, vectors=True, **slots)
    found.load_adapters(make_all(folder, found.folders["base"]))
    width, layers = hidden(found.folders["opt"])
    own = make_conditional(folder / "opt-mean", width, [layers - 1], {0: {"above": 0.0}},
                           seed=3, gate="prompt", similarity="cosine")  # fmt: skip
    found.load_adapters({"opt-mean": own}, "opt")
    yield found
    del found
    gc.collect()


def batch(seed: int, uses: Sequence[tuple[Use, ...]], longest: int = 150, length: int = 0,
          spec: Mapping[str, object] | None = None) -> list[Case]:  # fmt: skip
    """Requests that join and leave at different steps; some prompts are read in chunks."""
    rng = random.Random(seed)
    return [
        Case(prompt(rng, 3, longest), spec, {}, length or rng.randint(5, 9), rng.randrange(9),
             adapters=own)
        for own in uses
    ]  # fmt: skip


def test_each_alone_is_the_formula(engine: Engine) -> None:
    uses: list[tuple[Use, ...]] = [*([(Use(name),) for name in NAMES] * 3), (), (Use("vector"),)]
    cases = batch(1, uses)
    assert_exact(engine, cases, engine.run(cases))


def test_beside_others_in_one_request(engine: Engine) -> None:
    uses = [
        (Use("mean"), Use("lora", 0.7)), (Use("token", -0.5), Use("vector", 0.5)),
        (Use("either"), Use("cosine", 0.5), Use("lora")), (Use("last", where='{"first": 3}'),),
        (Use("mean"), Use("token")), (),
    ]  # fmt: skip
    cases = batch(2, uses)
    assert_exact(engine, cases, engine.run(cases))


def test_streams_decide_by_their_own_prompts(engine: Engine) -> None:
    own = {"twin": prompt(random.Random(0), 40, 60)}
    uses = [(Use("mean", stream="twin"), Use("cosine")), (Use("token", stream="twin"),)]
    cases = batch(3, uses, spec=GUIDANCE)
    cases += [Case(c.prompt, c.spec, own, 6, 2, adapters=c.adapters) for c in cases]
    mix = {"method": "mix", "weights": {"base": 0.6, "opt": 0.5}}
    cases += batch(4, [(Use("opt-mean", stream="opt"), Use("mean"))] * 3, spec=mix)
    assert_exact(engine, cases, engine.run(cases))


def test_preempted_requests_decide_the_same(engine: Engine) -> None:
    before = engine.preemptions()
    cases = batch(5, [(Use(name),) for name in NAMES * 2], 150, BLOCK)
    assert_exact(engine, cases, engine.run(cases))
    assert engine.preemptions() > before


def test_some_act_and_some_do_not(engine: Engine) -> None:
    """Else the tests above could pass with gates that are always open, or never."""
    for name in (*PROJECTED, "cosine"):
        rng, changed = random.Random(6), []
        prompts = [prompt(rng, 20, 120) for _ in range(10)]
        plain = engine.run([Case(ids, max_tokens=3) for ids in prompts])
        own = engine.run([Case(ids, max_tokens=3, adapters=(Use(name),)) for ids in prompts])
        for one, other in zip(plain, own, strict=True):
            changed.append(logprobs(one) != pytest.approx(logprobs(other), abs=TOLERANCE))
        assert 0 < sum(changed) < len(changed), name


@pytest.mark.parametrize("name", ["mean", "last", "token"])
def test_prefixes_that_are_cached(engine: Engine, name: str) -> None:
    """A prompt decides by its states, which cached blocks have not. The next turn of a conversation
    does not find the reply, where the vector acted, in its prompt.
    """
    first = Case(prompt(random.Random(7), 100, 100), max_tokens=BLOCK + 9, adapters=(Use(name),))
    cold, warm = (engine.run([first], salt="hits")[0] for _ in range(2))
    assert warm.num_cached_tokens == (96 if name == "token" else 0)
    ids = [*first.prompt, *tokens(cold), *prompt(random.Random(8), 5, 5)]
    second = Case(ids, max_tokens=4, adapters=(Use(name),))
    (answer,) = engine.run([second], salt="hits")
    assert_exact(engine, [first, first, second], [cold, warm, answer])


def test_a_prompt_that_decides_cannot_be_steered_itself(engine: Engine) -> None:
    for where in ("all", "prompt", "last_prompt", {"prompt_first": 2}):
        with pytest.raises(BadValue, match=r"adapters\.where: .*own positions"):
            engine.add(Case([5, 6], adapters=(Use("mean", where=json.dumps(where)),)))
