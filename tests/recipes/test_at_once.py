"""Every recipe in one engine, at once, beside plain requests; each against its paper's formula.

The searches' loops run in the front end (`test_search`): here are the requests that they make of an
engine, which draw blocks, add up two streams' log-probabilities, and have a head read a reply.
"""

from __future__ import annotations

import gc
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from steering.engine_args import StreamSource, adapter_engine_args
from steering.plan import Best, SteeringPlan
from tests.engine.driver import Case, Engine, Use, logprobs, tokens
from tests.engine.test_exactness import TOLERANCE, prompt
from tests.models import VOCAB_SIZE
from tests.recipes import rules, table_search, table_taps, vectors
from tests.recipes.page import SERVED
from tests.recipes.row import ascii_of
from tests.recipes.rules import Formula, log_p, rows
from tests.recipes.test_taps import all_layers, dola, sled

pytestmark = pytest.mark.engine

MARGIN = 1e-4
TOKENS = 7
PLAIN = "plain requests"
LAYERS = 2
STREAMS: Mapping[str, tuple[str, int] | str] = {
    "chat": ("qwen2", VOCAB_SIZE),
    "plain": ("gpt2", VOCAB_SIZE),
    "third": ("qwen3", VOCAB_SIZE),
    "twin": "base",
}
OURS = {"value": "value", "reward": "value", "small": "chat", "tuned": "chat", "untuned": "plain"}
"""Names of streams in the table of searches → the ones here."""


@dataclass(frozen=True)
class Round(Case):
    """What a search asks of the engine.

    Args:
        proposal: "draw" or "fallback".
    """

    proposal: str = "draw"


class Searching(Engine):
    """An engine that gets what the front end makes of a search."""

    def plan(self, case: Case) -> SteeringPlan | None:
        """The plan of one block, or of a head that reads a reply."""
        found = super().plan(case)
        if found is None or found.search is None:
            return found
        assert isinstance(case, Round)
        proposal = getattr(found.search, case.proposal)
        if not case.reply:
            return found.proposing(proposal)
        return replace(found, search=None, best=Best(proposal.score.head, 1, proposal.score.body))


Check = Callable[[Engine, Case, Any, str], None]
"""(engine, request, its output, its tag): raises unless the output is the formula's."""


def follows(formula: Formula) -> Check:
    """Every token's log-probability is the formula's, and without a temperature the largest."""

    def check(engine: Engine, case: Case, output: Any, tag: str) -> None:
        drawn = tokens(output)
        assert len(drawn) == TOKENS
        own: dict[str, float] = defaultdict(float)
        for n, (token, got) in enumerate(zip(drawn, logprobs(output), strict=True)):
            read = rows(engine, case, drawn[:n])
            want = log_p(formula(read, n))
            assert got == pytest.approx(want[token], abs=TOLERANCE), n
            assert case.params or want[token] >= want.max() - MARGIN, n
            for name in engine.folders:
                own[name] += float(log_p(read[name])[token])
        plan = engine.plan(case)
        if plan is not None and plan.likelihoods:
            told = engine.report(tag, output)["0"]["likelihoods"]
            assert told == pytest.approx({n: own[n] for n in plan.likelihoods}, abs=TOLERANCE)

    return check


def reads(engine: Engine, case: Case, output: Any, tag: str) -> None:
    """The head's number is the one after the reply."""
    ((name, told),) = engine.report(tag, output)["0"]["heads"].items()
    want = engine.heads[name].read([*case.prompt, *case.reply])
    assert told == pytest.approx(want, abs=TOLERANCE)


def layered(formula: Callable[[Any], Any]) -> Check:
    """The same as `follows`, for a formula of all layers' scores."""

    def check(engine: Engine, case: Case, output: Any, _tag: str) -> None:
        text, wanted = list(case.prompt), []
        for token in tokens(output):
            z = formula(all_layers(engine, text)).log_softmax(0)
            assert z[token] >= z.max() - MARGIN
            wanted.append(float(z[token]))
            text.append(token)
        assert logprobs(output) == pytest.approx(wanted, abs=TOLERANCE)

    return check


def edited(edit: vectors.Edit, at: str) -> Check:
    """Tokens and log-probabilities of a model with the paper's hook, which changes them."""

    def check(engine: Engine, case: Case, output: Any, _tag: str) -> None:
        base = engine.folders["base"]
        want = vectors.Edited(base, edit, at).decode(list(case.prompt), TOKENS)
        assert tokens(output) == want[0]
        assert logprobs(output) == pytest.approx(want[1], abs=TOLERANCE)
        plain = vectors.Edited(base, lambda h, *_: h, at).decode(list(case.prompt), TOKENS)
        same = plain[1] == pytest.approx(want[1], abs=100 * TOLERANCE)
        assert same != getattr(edit, "acts", True)

    return check


Asked = dict[str, list[tuple[Case, Check]]]
"""Recipe → its requests."""


def of_rules(rng: random.Random) -> Asked:
    found: Asked = {}
    for name, (spec, formula) in rules.HERE.items():
        own = {"twin": prompt(rng, 8, 8)} if name == "ROSE" else {}
        found[name] = [(Case(prompt(rng, 8, 40), spec, own, TOKENS), follows(formula))]
    return found


def of_taps(rng: random.Random) -> Asked:
    formulas = [dola([1]), dola([*range(LAYERS)]), sled(2.0, 10)]
    found: Asked = {}
    for row, formula in zip(table_taps.ROWS, formulas, strict=True):
        spec = json.loads(row.request)
        spec["layers"] = [name for name in spec["layers"] if int(name[1:]) < LAYERS]
        found[row.name] = [(Case(prompt(rng, 8, 40), spec, {}, TOKENS), layered(formula))]
    return found


def of_vectors(rng: random.Random, folder: Path, engine: Engine) -> Asked:
    """At prompts of several lengths: where they act counts from either end."""
    sizes = vectors.Sizes(engine.folders["base"])
    found: Asked = {}
    for name, make in vectors.RECIPES.items():
        files, where, weight, edit, at = make(folder / name, sizes)
        engine.load_adapters({name: files})
        use, check = (Use(name, weight, where=where),), edited(edit, at)
        lengths = (6, 41, 120)
        found[name] = [(Case(prompt(rng, n, n), None, {}, TOKENS, adapters=use), check)
                       for n in lengths]  # fmt: skip
    return found


def scores_of(stream: str) -> Formula:
    """One stream alone."""
    return lambda s, _: s[stream]


def of_searches(rng: random.Random) -> Asked:
    """Two blocks of each proposal, and what is scored by a head."""
    found: Asked = {}
    for row in table_search.ROWS:
        request = row.request
        for theirs, ours in OURS.items():
            request = request.replace(f'"{theirs}"', f'"{ours}"')
        spec = json.loads(request)
        asked: list[tuple[Case, Check]] = []
        for which in ("draw", "fallback"):
            proposal = spec if which == "draw" else spec.get("fallback")
            if proposal is None:
                continue
            check = follows(scores_of(proposal.get("draw", "base")))
            for seed in (1, 2):
                params = {"temperature": 1.0, "seed": seed}
                case = Round(prompt(rng, 8, 40), spec, {}, TOKENS, params=params, proposal=which)
                asked.append((case, check))
            if "value" in proposal.get("score", {}):
                case = Round(prompt(rng, 8, 40), spec, max_tokens=1, reply=prompt(rng, 3, 9),
                             proposal=which)  # fmt: skip
                asked.append((case, reads))
        found[row.name] = asked
    return found


Answers = dict[str, list[tuple[Case, Check, Any, str]]]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Answers, int]]:
    """All requests with their answers, and how many ran in one step."""
    folder = tmp_path_factory.mktemp("models")
    engine = Searching(
        folder,
        ("llama", VOCAB_SIZE),
        STREAMS,
        rules.make_heads,
        taps={f"l{n}": StreamSource(on="base", layer=n, norm=False) for n in range(LAYERS)},
        vectors=True,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        **adapter_engine_args(len(vectors.RECIPES), 16),
    )
    rng = random.Random(7)
    # Those that read a reply are done after one step: they come last.
    asked = of_rules(rng) | of_taps(rng) | of_vectors(rng, folder / "vectors", engine)
    plain = [Case(prompt(rng, 8, 40), None, {}, TOKENS) for _ in range(2)]
    asked |= {PLAIN: [(case, follows(scores_of("base"))) for case in plain]}
    asked |= of_searches(rng)
    flat = [(name, *one) for name, several in asked.items() for one in several]
    flat.sort(key=lambda one: bool(one[1].reply))
    running: list[int] = []
    scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        running.append(len(output.num_scheduled_tokens))
        return output

    scheduler.schedule = watched
    outputs = engine.run([case for _, case, _ in flat])
    answers: Answers = defaultdict(list)
    for (name, case, check), output, tag in zip(flat, outputs, engine.tags, strict=True):
        answers[name].append((case, check, output, tag))
    yield engine, answers, max(running)
    del engine, scheduler.schedule, scheduler
    gc.collect()


@pytest.mark.parametrize("name", [*SERVED, PLAIN], ids=ascii_of)
def test_the_recipe_is_its_formula(batch: tuple[Engine, Answers, int], name: str) -> None:
    engine, answers, _ = batch
    assert answers[name]
    for case, check, output, tag in answers[name]:
        check(engine, case, output, tag)


def test_all_of_them_run_in_one_step(batch: tuple[Engine, Answers, int]) -> None:
    _, answers, together = batch
    assert together == sum(len(several) for several in answers.values())
    assert answers.keys() == {*SERVED, PLAIN}
