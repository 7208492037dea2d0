"""The adapter sum inside the engine: every row as PEFT, or plain MeteoRA, computes it alone."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Iterator

import pytest

from steering.engine_args import adapter_engine_args
from tests.adapters.make import ATTENTION, make_lora, make_native, make_released
from tests.adapters.models import routed
from tests.engine.driver import BLOCK, Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE, assert_exact, prompt
from tests.models import VOCAB_SIZE
from tests.reference import prompt_logprobs

pytestmark = pytest.mark.engine

PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 0.8}
GUIDANCE = {"method": "guidance", "negative": "twin", "strength": 1.4}

USES: list[tuple[Use, ...]] = [
    (),
    (Use("one"),),
    (Use("one", 0.4),),
    (Use("one", -0.7),),
    (Use("one", 0.0),),
    (Use("one", 0.6), Use("two", 0.9)),
    (Use("two", -0.5), Use("one", 1.3)),
    (Use("two"), Use("chat", stream="chat")),
    (Use("chat", 0.5, stream="chat"),),
    (Use("native"),),
    (Use("native", top_k=3, temperature=15.0),),
    (Use("native", 0.8, top_k=1),),
    (Use("released"),),
    (Use("released", top_k=4, temperature=20.0), Use("one", 0.5)),
    (Use("two", 0.7, stream="twin"), Use("one")),
]
"""Eleven different sets; slots of the engine: 4."""


@pytest.fixture(scope="module")
def adapting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A base with companions and a twin, and slots for four sets at a time."""
    folder = tmp_path_factory.mktemp("models")
    streams: dict[str, tuple[str, int] | str] = {
        "chat": ("qwen2", VOCAB_SIZE),
        "plain": ("gpt2", VOCAB_SIZE),
        "twin": "base",
    }
    # Fewer sets in memory than the tests use: some are loaded a second time.
    slots = {**adapter_engine_args(4, 48), "max_cpu_loras": 6}
    found = Engine(folder, ("llama", VOCAB_SIZE), streams, **slots)
    base, chat = found.folders["base"], found.folders["chat"]
    found.load_adapters(
        {
            "one": make_lora(folder / "one", base, seed=1),
            "two": make_lora(
                folder / "two", base, seed=2, targets=ATTENTION, use_rslora=True,
                rank_pattern={"q_proj": 6}, alpha_pattern={"layers.0.self_attn.o_proj": 3},
            ),
            "native": make_native(folder / "native", base, tasks=3, seed=10),
            "released": make_released(folder / "released", base, tasks=5, seed=20),
        }
    )  # fmt: skip
    found.load_adapters({"chat": make_lora(folder / "lora-chat", chat, seed=3)}, "chat")
    yield found
    del found
    gc.collect()


def mixed(seed: int, count: int, own: bool) -> list[Case]:
    """Cases of all kinds of adapters, steered and not, joining and leaving at different steps."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        uses = USES[i % len(USES)]
        spec = [None, PROXY, GUIDANCE][i // len(USES) % 3]
        used = {id(PROXY): ("chat", "plain"), id(GUIDANCE): ("twin",)}.get(id(spec), ())
        prompts = {s: prompt(rng, 1, 120) for s in used if own and rng.random() < 0.5}
        ids, drawn, arrives = prompt(rng, 1, 90), rng.randint(4, 10), rng.randrange(12)
        cases.append(Case(ids, spec, prompts, drawn, arrives, adapters=uses))
    return cases


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_all_kinds_of_adapters_share_batches(adapting: Engine, own: bool) -> None:
    cases = mixed(1 + own, 3 * len(USES), own)
    assert_exact(adapting, cases, adapting.run(cases))


def test_adapters_change_the_answers(adapting: Engine) -> None:
    """Else the tests above could pass with adapters that do nothing."""
    ids = prompt(random.Random(3), 30, 30)
    idle = (USES[4], USES[-1])  # a weight of 0, and an adapter on a stream that is not used
    cases = [Case(ids, PROXY, adapters=uses) for uses in USES if uses not in idle]
    found = [logprobs(output) for output in adapting.run(cases)]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert one != pytest.approx(other, abs=100 * TOLERANCE)


def test_base_rows_beside_adapted_rows_keep_their_bits(adapting: Engine) -> None:
    rng = random.Random(4)
    prompts = [prompt(rng, 20, 60) for _ in range(8)]
    alone = [Case(ids, max_tokens=8) for ids in prompts]
    uses = [USES[0], USES[1], USES[0], USES[4], USES[5], USES[0], USES[9], USES[12]]
    beside = [Case(ids, max_tokens=8, adapters=u) for ids, u in zip(prompts, uses, strict=True)]
    want = adapting.run(alone, salt="alone")
    found = adapting.run(beside, salt="beside")
    for use, got, base in zip(uses, found, want, strict=True):
        if not use or use == USES[4]:
            assert tokens(got) == tokens(base)
            assert logprobs(got) == logprobs(base)  # bit for bit
        else:
            assert logprobs(got) != pytest.approx(logprobs(base), abs=100 * TOLERANCE)


def test_prefixes_are_shared_only_under_the_same_adapters(adapting: Engine) -> None:
    ids = prompt(random.Random(5), 100, 100)
    uses: list[tuple[Use, ...]] = [
        (),
        (Use("one"),),
        (Use("one", 0.5),),
        (Use("two"),),
        (Use("one"), Use("two")),
        (Use("native"),),
        (Use("native", top_k=1),),
        (Use("native", temperature=15.0),),
        (Use("one", stream="twin"),),
    ]
    cases = [Case(ids, GUIDANCE if u and u[0].stream == "twin" else None, adapters=u) for u in uses]
    cold = [adapting.run([case], salt="hits")[0] for case in cases]
    warm = [adapting.run([case], salt="hits")[0] for case in cases]
    assert [o.num_cached_tokens for o in cold] == [0] * len(uses)
    assert all(o.num_cached_tokens >= 2 * BLOCK for o in warm)
    assert_exact(adapting, cases, cold)
    assert_exact(adapting, cases, warm)


def test_sets_that_are_read_ahead_are_the_same(adapting: Engine) -> None:
    def read(uses: tuple[Use, ...], seconds: float) -> bool:
        _, found = adapting.adapted(Case([1], adapters=uses))
        assert found is not None
        path = found.lora_request()["lora_path"]
        answer = adapting.llm.collective_rpc("coxswain_read_ahead", args=(path, seconds))[0]
        done: bool = answer["done"]
        return done

    def uses(i: int) -> tuple[Use, ...]:
        """Sets that no other test has loaded."""
        pairs = [("native", "one"), ("native", "two"), ("released", "two"), ("native", "released")]
        return tuple(Use(name) for name in pairs[i])

    assert not read(uses(0), 0.0)  # its other half is read when it is loaded
    pieces = 1
    while not read(uses(1), 0.0):
        pieces += 1
    assert pieces > 7
    for i in (2, 3):
        assert read(uses(i), 60.0)
    cases = [Case(prompt(random.Random(i), 20, 40), adapters=uses(i)) for i in range(4)]
    assert_exact(adapting, cases, adapting.run(cases))
    assert read(uses(3), 0.0)  # it is there: nothing to read


def test_prompt_log_probabilities_are_the_adapted_models(adapting: Engine) -> None:
    rng = random.Random(6)
    others = [Case(prompt(rng, 30, 30), PROXY, adapters=USES[5]), Case(prompt(rng, 20, 20))]
    for spec, uses in ((None, USES[5]), (PROXY, USES[7]), (None, USES[12])):
        params = {"prompt_logprobs": 0}
        case = Case(prompt(rng, 120, 120), spec, params=params, max_tokens=2, adapters=uses)
        output = adapting.run([case, *others])[0]
        models = {n: adapting.model(n, uses) for n in adapting.streams(case)}
        want = prompt_logprobs(models, case.prompt, adapting.mix(case))
        for t, entry in enumerate(output.prompt_logprobs[1:]):
            token = case.prompt[t + 1]
            assert entry[token].logprob == pytest.approx(want[t, token], abs=TOLERANCE)


def test_several_choices_are_all_adapted(adapting: Engine) -> None:
    params = {"n": 3, "temperature": 1.0, "seed": 5}
    case = Case(prompt(random.Random(7), 40, 40), PROXY, params=params, adapters=USES[7])
    output = adapting.run([case])[0]
    for i in range(3):
        drawn = iter(tokens(output, i))
        steps = adapting.reference(case, choose=lambda _, drawn=drawn: next(drawn))
        assert logprobs(output, i) == pytest.approx([s.logprob for s in steps], abs=TOLERANCE)


def test_reports_count_the_routes(adapting: Engine) -> None:
    rng = random.Random(9)
    uses = [(Use("native"),), (Use("released", top_k=1), Use("one")), (Use("native", top_k=3),)]
    uses.append((Use("native", stream="twin"),))
    specs = [None, PROXY, None, GUIDANCE]
    cases = [
        Case(prompt(rng, 20, 60), spec, report="summary" if i else "off", adapters=own)
        for i, (spec, own) in enumerate(zip(specs, uses, strict=True))
    ]
    outputs = adapting.run([*cases, Case(prompt(rng, 20, 20), PROXY, report="summary")])
    tags = adapting.tags
    assert adapting.report(tags[4], outputs[4])["0"]["routed"] == {}
    for case, output, tag in list(zip(cases, outputs, tags, strict=False))[1:]:
        use = case.adapters[0]
        text = [*case.prompt, *tokens(output)[:-1]]
        want = routed(adapting.model(use.stream, case.adapters), text)
        found = adapting.report(tag, output)["0"]["routed"]
        assert found == {use.stream: {adapting.digests[use.name]: want}}


def test_preempted_requests_resume_with_their_adapters_compiled(
    tmp_path_factory: pytest.TempPathFactory, adapting: Engine
) -> None:
    folder = tmp_path_factory.mktemp("models")
    streams: dict[str, tuple[str, int] | str] = {"twin": "base"}
    slots = {**adapter_engine_args(3, 16), "num_gpu_blocks_override": 28}
    slots["enforce_eager"] = shutil.which("g++") is None  # what torch compiles CPU kernels with
    tight = Engine(folder, ("llama", VOCAB_SIZE), streams, **slots)
    assert tight.compiled or slots["enforce_eager"]
    names = ("one", "two", "native")
    # The same base: weights depend on the seed, which is the stream's place.
    tight.load_adapters({name: adapting.adapters[name].folder for name in names})
    rng = random.Random(8)
    cases = []
    for i in range(10):
        uses = [(), (Use("one"),), (Use("two", 0.5), Use("one")), (Use("native"),)][i % 4]
        spec = GUIDANCE if i % 3 else None
        cases.append(Case(prompt(rng, 70, 110), spec, max_tokens=2 * BLOCK, adapters=uses))
    outputs = tight.run(cases)
    assert tight.preemptions() > 0
    assert_exact(tight, cases, outputs)
