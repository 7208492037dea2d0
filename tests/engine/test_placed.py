"""Adapters that act behind a text of the reply, and aLoRA, which acts from its invocation tokens
on: exact against hooks that look at the text, and against PEFT's own aLoRA.

The engine has too few blocks for the larger tests, so requests are preempted; prompts are longer
than a step, so they are read in chunks.
"""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.variants import calculate_alora_offsets

from steering.engine_args import adapter_engine_args
from steering.errors import BadValue
from tests.adapters import kinds
from tests.adapters.kinds import lora
from tests.adapters.make import make_native
from tests.adapters.vectors import make_vector
from tests.engine.driver import BLOCK, Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE, assert_exact, prompt
from tests.engine.test_phases import text_in
from tests.engine.test_vectors import GUIDANCE, MIX, hidden
from tests.models import VOCAB_SIZE, make_tokenizer
from tests.reference import fresh

pytestmark = pytest.mark.engine

INVOCATION = [70, 71, 70]


def make_all(folder: Path, base: Path) -> dict[str, Path]:
    width, layers = hidden(base)
    alora = lora(alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")
    return {
        "vector": make_vector(folder / "vector", width, range(layers), seed=1),
        "lora": kinds.make(kinds.Case("lora", lora()), folder / "lora", base, seed=5),
        "alora": kinds.make(kinds.Case("alora", alora), folder / "alora", base, seed=6),
        "pack": make_native(folder / "pack", base, tasks=3, seed=7),
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("models")
    slots = {**adapter_engine_args(4, 48), "max_cpu_loras": 6, "num_gpu_blocks_override": 24}
    streams: dict[str, tuple[str, int] | str] = {
        "opt": ("opt", VOCAB_SIZE), "plain": ("gpt2", VOCAB_SIZE), "twin": "base",
    }  # fmt: skip
    found = Engine(folder, ("llama", VOCAB_SIZE), streams, vectors=True, **slots)
    found.load_adapters(make_all(folder, found.folders["base"]))
    yield found
    del found
    gc.collect()


def behind(engine: Engine, seed: int, count: int, longest: int = 120) -> list[Case]:
    """Requests whose adapters begin, or end, to act behind a text of their replies."""
    rng, cases = random.Random(seed), []
    for i in range(count):
        ids = prompt(rng, 3, longest)
        text = text_in(engine, Case(ids, max_tokens=8), 1 + i % 3)
        wheres = [{"after": text}, {"until": text}, {"after": text, "from": 4}, {"until": text,
                  "first": 2}]  # fmt: skip
        name = ("vector", "lora", "pack")[i % 3]
        use = Use(name, where=json.dumps(wheres[i % 4]))
        cases.append(Case(ids, None, {}, 8, rng.randrange(6), adapters=(use,)))
    return cases


def test_behind_a_text_of_the_reply(engine: Engine) -> None:
    cases = [*behind(engine, 1, 12), Case(prompt(random.Random(2), 9, 9), max_tokens=8)]
    outputs = engine.run(cases)
    assert_exact(engine, cases, outputs)
    plain = engine.run([Case(c.prompt, max_tokens=8) for c in cases])
    changed = [
        logprobs(one) != pytest.approx(logprobs(other), abs=10 * TOLERANCE)
        for one, other in zip(outputs, plain, strict=True)
    ]
    assert sum(changed) >= 8 and not changed[-1]


def test_what_the_prompt_has_closed(engine: Engine) -> None:
    encode = make_tokenizer().encode
    opened, closed = (encode(t, add_special_tokens=False) for t in ("<think>", "</think>"))
    rng, cases = random.Random(3), []
    for own in ([*opened, *closed], opened, closed, [*closed, *opened]):
        for where in ({"after": "</think>"}, {"until": "</think>"}):
            ids = [*prompt(rng, 5, 9), *own, *prompt(rng, 3, 5)]
            cases.append(Case(ids, adapters=(Use("vector", where=json.dumps(where)),)))
    assert_exact(engine, cases, engine.run(cases))


def test_streams_and_preemption(engine: Engine) -> None:
    before = engine.preemptions()
    cases = [Case(c.prompt, None, {}, BLOCK, adapters=c.adapters)
             for c in behind(engine, 4, 8, 150)]  # fmt: skip
    for spec in (GUIDANCE, MIX):
        ids = prompt(random.Random(5), 20, 30)
        text = text_in(engine, Case(ids, spec, max_tokens=8), 2)
        where = json.dumps({"after": text})
        stream = "twin" if spec is GUIDANCE else "base"
        cases.append(Case(ids, spec, {}, 12, adapters=(Use("vector", 1.0, stream, where=where),)))
    assert_exact(engine, cases, engine.run(cases))
    assert engine.preemptions() > before


def test_the_next_turn_does_not_find_what_was_steered(engine: Engine) -> None:
    ids = prompt(random.Random(6), 40, 40)
    text = text_in(engine, Case(ids, max_tokens=8), 2)
    use = Use("vector", where=json.dumps({"after": text}))
    first = Case(ids, max_tokens=2 * BLOCK, adapters=(use,))
    (output,) = engine.run([first], salt="turns")
    second = Case([*ids, *tokens(output), *prompt(random.Random(7), 5, 5)], adapters=(use,))
    (answer,) = engine.run([second], salt="turns")
    assert_exact(engine, [first, second], [output, answer])
    assert answer.num_cached_tokens == BLOCK


def test_a_text_bounds_no_positions_of_the_prompt(engine: Engine) -> None:
    for where in (
        {"after": "a", "prompt_first": 2},
        {"until": ""},
        {"after": 3},
        {"after": 99 * "a"},
    ):
        with pytest.raises(Exception, match="where"):
            engine.add(Case([5], adapters=(Use("vector", where=json.dumps(where)),)))


# --- aLoRA ----------------------------------------------------------------------------------------


def invoked(rng: random.Random, *, times: int = 1, longest: int = 110) -> list[int]:
    """A prompt with the invocation in it."""
    ids = prompt(rng, 3, longest)
    for _ in range(times):
        ids = [*ids, *INVOCATION, *prompt(rng, 2, 12)]
    return ids


def by_peft(engine: Engine, case: Case, drawn: Sequence[int]) -> list[float]:
    """Log-probabilities of a reply by PEFT's aLoRA: its offset is the prompt's, and grows."""
    folder = engine.adapters["alora"].folder
    model = PeftModel.from_pretrained(fresh(engine.folders["base"]), folder).eval()
    ids = torch.tensor([[*case.prompt, *drawn]])
    offsets = calculate_alora_offsets(
        model.peft_config, model.active_adapter, torch.tensor([case.prompt])
    )
    offsets = [o and o + len(drawn) for o in offsets]
    with torch.inference_mode():
        scores = model(ids, alora_offsets=offsets).logits[0].log_softmax(-1)
    at = range(len(case.prompt) - 1, len(case.prompt) + len(drawn) - 1)
    return [float(scores[i, token]) for i, token in zip(at, drawn, strict=True)]


def test_an_alora_is_pefts(engine: Engine) -> None:
    rng, use = random.Random(8), (Use("alora"),)
    prompts = [invoked(rng), invoked(rng, times=2), INVOCATION, prompt(rng, 30, 30),
               [*prompt(rng, 5, 5), *INVOCATION], invoked(rng, times=3, longest=60)]  # fmt: skip
    cases = [Case(ids, None, {}, 6, rng.randrange(5), adapters=use) for ids in prompts]
    cases += [Case(invoked(rng), max_tokens=6), Case(invoked(rng), adapters=(Use("lora"),))]
    outputs = engine.run(cases)
    for case, output in zip(cases[:-2], outputs[:-2], strict=True):
        assert logprobs(output) == pytest.approx(by_peft(engine, case, tokens(output)),
                                                 abs=TOLERANCE)  # fmt: skip
    assert_exact(engine, cases[-2:], outputs[-2:])
    (plain,) = engine.run([Case(prompts[3], max_tokens=6)])
    assert logprobs(plain) == pytest.approx(logprobs(outputs[3]), abs=1e-6)
    (plain,) = engine.run([Case(prompts[0], max_tokens=6)])
    assert logprobs(plain) != pytest.approx(logprobs(outputs[0]), abs=10 * TOLERANCE)


def test_preempted_aloras_begin_where_they_began(engine: Engine) -> None:
    rng, before = random.Random(9), engine.preemptions()
    cases = [Case(invoked(rng), None, {}, BLOCK, adapters=(Use("alora"),)) for _ in range(12)]
    for case, output in zip(cases, engine.run(cases), strict=True):
        assert logprobs(output) == pytest.approx(by_peft(engine, case, tokens(output)),
                                                 abs=TOLERANCE)  # fmt: skip
    assert engine.preemptions() > before


def test_the_base_s_prefix_answers_up_to_the_invocation(engine: Engine) -> None:
    rng = random.Random(10)
    ids = [*prompt(rng, 80, 80), *INVOCATION, *prompt(rng, 40, 40)]
    plain, use = Case(ids, max_tokens=5), (Use("alora"),)
    (base,) = engine.run([plain], salt="tenant")
    case = Case(ids, max_tokens=5, adapters=use)
    found = [engine.run([case], salt=salt)[0] for salt in ("tenant", "tenant", "other", "other")]
    assert [one.num_cached_tokens for one in found] == [64, 64, 0, 64]
    for one in found:
        assert logprobs(one) == pytest.approx(by_peft(engine, case, tokens(one)), abs=TOLERANCE)
    (back,) = engine.run([plain], salt="other")
    assert back.num_cached_tokens == 64  # what the adapter changed is not the base's
    assert logprobs(back) == pytest.approx(logprobs(base), abs=TOLERANCE)
    both = Case(ids, max_tokens=5, adapters=(*use, Use("lora")))
    assert engine.run([both], salt="tenant")[0].num_cached_tokens == 0
    # The next turn calls it again, and its base positions are more.
    turn = Case([*ids, *tokens(found[0]), *INVOCATION, *prompt(rng, 3, 3)], adapters=use)
    (answer,) = engine.run([turn], salt="tenant")
    want = by_peft(engine, turn, tokens(answer))
    assert logprobs(answer) == pytest.approx(want, abs=TOLERANCE)


def test_an_alora_has_its_own_place(engine: Engine) -> None:
    with pytest.raises(BadValue, match=r"adapters\.where: .*invocation"):
        engine.add(Case([5], adapters=(Use("alora", where='"all"'),)))
