"""Heads that are read for a report: at the end of replies, and where tokens are drawn."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engine.driver import BLOCK, Case, Engine, logprobs, tokens
from tests.engine.heads import Headed, classifier, probe, valued
from tests.engine.test_exactness import TOLERANCE, prompt
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine


def make_heads(folder: Path, bodies: Mapping[str, Path]) -> dict[str, Headed]:
    """Value streams, a classifier with a body, heads on other streams."""
    return {
        "value": valued(folder / "value", "qwen2", 21),
        "kind": valued(folder / "kind", "llama", 22, port=True),
        "critic": classifier(folder / "critic", "gpt2", 12, tokens=True, labels=2),
        "probe": probe(folder / "probe", bodies["base"], "base", 15),
        "network": probe(folder / "network", bodies["chat"], "chat", 16, hidden=24),
    }


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE),
        {"chat": ("qwen2", VOCAB_SIZE), "plain": ("gpt2", VOCAB_SIZE)},
        make_heads,
    )
    yield found
    del found
    gc.collect()


HEADS = ("value", "kind", "critic", "probe", "network")
PROXY = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 0.9}
VALUES: dict[str, Any] = {
    "method": "value_augmented",
    "values": [{"stream": "value", "strength": 2.0}, {"stream": "kind", "strength": 0.5}],
    "top_k": 5,
}


def best(head: str) -> dict[str, Any]:
    return {"method": "best_of_n", "value": head}


def reading(rng: random.Random, head: str, own: bool = False) -> Case:
    """A reply of some length to be read by a head."""
    body = {"network": "chat"}.get(head, head)
    prompts = {body: prompt(rng, 1, 100)} if own and head != "probe" else {}
    ids, reply = prompt(rng, 1, 120), prompt(rng, 1, 90)
    arrives = rng.randrange(6)
    return Case(ids, best(head), prompts, max_tokens=1, arrives=arrives, reply=reply)


def expected(engine: Engine, case: Case) -> float:
    """A full forward of the head's model over its prompt and the reply."""
    assert case.spec is not None
    head = engine.heads[case.spec["value"]]
    body = head.on or case.spec["value"]
    return head.read([*case.own.get(body, case.prompt), *case.reply])


def told(engine: Engine, case: Case, output: Any, tag: str) -> float:
    assert case.spec is not None
    report = engine.report(tag, output)["0"]
    assert report["heads"].keys() == {case.spec["value"]}
    number: float = report["heads"][case.spec["value"]]
    return number


@pytest.mark.parametrize("own", [False, True], ids=["same-prompt", "own-prompts"])
def test_replies_are_read_to_their_end_beside_all_else(headed: Engine, own: bool) -> None:
    """Prompts in chunks of 96 tokens, joining and leaving at different steps."""
    rng = random.Random(31 + own)
    read = [reading(rng, head, own) for head in HEADS * 3]
    others = [Case(prompt(rng, 1, 90), s, arrives=rng.randrange(9)) for s in (None, PROXY, None)]
    outputs = headed.run([*read, *others])
    for case, output, tag in zip(read, outputs, headed.tags, strict=False):
        assert told(headed, case, output, tag) == pytest.approx(expected(headed, case), abs=1e-4)
    for case, output in zip(others, outputs[len(read) :], strict=True):
        steps = headed.reference(case)
        assert tokens(output) == [s.token for s in steps]
        assert logprobs(output) == pytest.approx([s.logprob for s in steps], abs=TOLERANCE)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_replies_that_end_at_the_border_of_a_block(headed: Engine, length: int) -> None:
    rng = random.Random(length)
    own = {"value": prompt(rng, 3 * BLOCK, 3 * BLOCK)}
    cases = [
        Case(prompt(rng, 5, 5), best("value"), max_tokens=1, reply=prompt(rng, n, n))
        for n in (1, length - 5, 3 * BLOCK - 5)
    ] + [Case(prompt(rng, 5, 5), best("value"), own, 1, reply=prompt(rng, length, length))]
    for case, output, tag in zip(cases, headed.run(cases), headed.tags, strict=True):
        assert told(headed, case, output, tag) == pytest.approx(expected(headed, case), abs=1e-4)


def test_the_longest_reply_that_fits_leaves_one_token(headed: Engine) -> None:
    rng = random.Random(33)
    reply = prompt(rng, 411, 411)
    case = Case(prompt(rng, 100, 100), best("value"), max_tokens=1, reply=reply)
    assert len(case.prompt) + len(reply) == 512 - 1
    (output,) = headed.run([case])
    number = told(headed, case, output, headed.tags[0])
    assert number == pytest.approx(expected(headed, case), abs=1e-4)
    with pytest.raises(Exception, match="maximum model length"):
        headed.add(Case(case.prompt, case.spec, max_tokens=1, reply=[*reply, 9]))


def test_a_head_with_a_body_of_its_own_is_read_without_the_base(headed: Engine) -> None:
    rng = random.Random(34)
    for head, ran in (("value", {"value": 30}), ("probe", {"base": 30})):
        before = headed.counters()["tokens"]
        case = Case(prompt(rng, 20, 20), best(head), max_tokens=1, reply=prompt(rng, 10, 10))
        (output,) = headed.run([case])
        after = headed.counters()["tokens"]
        assert {n: after[n] - before[n] for n in after if after[n] != before[n]} == ran
        assert headed.report(headed.tags[0], output)["0"]["passes"] == dict.fromkeys(ran, 1)


def test_replies_share_the_prompt_s_cache_and_nothing_shares_one_without_the_base(
    headed: Engine,
) -> None:
    rng = random.Random(35)
    ids = prompt(rng, 3 * BLOCK, 3 * BLOCK)
    cases = [
        Case(ids, best("value"), max_tokens=1, reply=prompt(rng, 2 * BLOCK, 2 * BLOCK))
        for _ in range(3)
    ]
    hits = []
    for case in [*cases, cases[0]]:
        (output,) = headed.run([case])
        hits.append(output.num_cached_tokens)
        number = told(headed, case, output, headed.tags[0])
        assert number == pytest.approx(expected(headed, case), abs=1e-4)
    assert hits[:3] == [0, 3 * BLOCK, 3 * BLOCK]
    assert hits[3] > 3 * BLOCK
    # The same streams with the base, over the same tokens.
    steered = Case(
        [*ids, *cases[0].reply], {**VALUES, "values": VALUES["values"][:1]}, max_tokens=2
    )
    (output,) = headed.run([steered])
    assert output.num_cached_tokens == 0


def test_a_probe_on_the_base_reads_what_drawing_left_in_the_cache(headed: Engine) -> None:
    rng = random.Random(36)
    drawn = Case(prompt(rng, 2 * BLOCK, 2 * BLOCK), max_tokens=BLOCK)
    reply = tokens(headed.run([drawn])[0])
    case = Case(drawn.prompt, best("probe"), max_tokens=1, reply=reply)
    (output,) = headed.run([case])
    assert output.num_cached_tokens >= 2 * BLOCK
    number = told(headed, case, output, headed.tags[0])
    assert number == pytest.approx(expected(headed, case), abs=1e-4)


def test_token_reports_tell_the_value_in_front_of_each_token(headed: Engine) -> None:
    rng = random.Random(37)
    cases = [Case(prompt(rng, 30, 30), VALUES, report="tokens", max_tokens=6) for _ in range(2)]
    for case, output, tag in zip(cases, headed.run(cases), headed.tags, strict=True):
        detail = headed.report(tag, output)["0"]["detail"]
        assert len(detail) == 6
        for i, entry in enumerate(detail):
            text = [*case.prompt, *tokens(output)[:i]]
            want = {name: headed.heads[name].read(text) for name in ("value", "kind")}
            assert entry["heads"] == pytest.approx(want, abs=1e-4)
    quiet = Case(cases[0].prompt, VALUES, report="summary", max_tokens=2)
    (output,) = headed.run([quiet])
    assert headed.report(headed.tags[0], output)["0"]["heads"] == {}
