"""Drafts beside heads and adapters: what the draft stream does not know of, and what changes it."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from steering.engine_args import Speculation, adapter_engine_args
from tests.adapters.make import make_lora
from tests.adapters.vectors import make_reft, make_vector
from tests.engine.driver import Case, Engine, Use
from tests.engine.heads import Headed, classifier, probe, valued
from tests.engine.test_exactness import prompt
from tests.engine.test_heads import CRITICAL, VALUE, assert_exact
from tests.engine.test_speculation import CLOSE, SAME, accepted
from tests.engine.test_vectors import hidden
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.engine


def make_heads(folder: Path, bodies: Mapping[str, Path]) -> dict[str, Headed]:
    """A classifier, a probe and a value model."""
    return {
        "critic": classifier(folder / "critic", "llama", 11, tokens=True, labels=2),
        "probe": probe(folder / "probe", bodies["base"], "base", 15),
        "value": valued(folder / "value", "qwen2", 21),
    }


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("models")
    found = Engine(
        folder,
        ("llama", VOCAB_SIZE),
        {"chat": ("qwen2", VOCAB_SIZE), "plain": ("gpt2", VOCAB_SIZE)},
        make_heads,
        speculation=Speculation("chat", 3),
        vectors=True,
        **adapter_engine_args(4, 48),
    )
    found.load_adapters({"one": make_lora(folder / "one", found.folders["base"], seed=1)})
    chat = make_lora(folder / "lora-chat", found.folders["chat"], seed=3)
    width, layers = hidden(found.folders["base"])
    made = {
        "vector": make_vector(folder / "vector", width, range(layers), seed=4),
        "reft": make_reft(folder / "reft", width, [0], seed=5, where={"from": 3}),
    }
    found.load_adapters(made)
    width, layers = hidden(found.folders["chat"])
    vector = make_vector(folder / "chat-vector", width, range(layers), seed=6)
    found.load_adapters({"chat": chat, "chat-vector": vector}, "chat")
    yield found
    del found
    gc.collect()


def test_heads_beside_drafts(drafting: Engine) -> None:
    rng = random.Random(40)
    specs = [
        VALUE,
        CRITICAL,
        {**CRITICAL, "classifier": "probe", "aligned": "chat"},
        {**CRITICAL, "aligned": "chat", "pretrained": "base", "mode": "soft"},
        CLOSE,
        SAME,
        None,
    ]
    cases = [
        Case(prompt(rng, 5, 80), spec, max_tokens=15, arrives=rng.randrange(6), report="summary")
        for spec in specs
    ]
    outputs = drafting.run(cases)
    tags = drafting.tags
    assert_exact(drafting, cases, outputs)
    reports = [drafting.report(t, o)["0"] for t, o in zip(tags, outputs, strict=True)]
    assert [r["drafted"] > 0 for r in reports] == [False, False, True, True, True, True, False]
    assert reports[3]["accepted"] > 0


def test_a_stream_drafts_with_its_requests_adapters(drafting: Engine) -> None:
    rng = random.Random(41)
    own = Use("chat", stream="chat")
    used = [(SAME, (own,)), (SAME, ()), (CLOSE, (own, Use("one", 0.7))), (None, (Use("one"),))]
    cases = [
        Case(prompt(rng, 9, 40), spec, max_tokens=17, adapters=uses, report="summary")
        for spec, uses in used
    ]
    outputs = drafting.run(cases)
    tags = drafting.tags
    assert_exact(drafting, cases, outputs)
    for tag, output in list(zip(tags, outputs, strict=True))[:2]:
        report = drafting.report(tag, output)["0"]
        # The prompt gives a token, and each of four steps four: nothing is rejected.
        assert (report["passes"]["base"], report["drafted"], report["accepted"]) == (5, 12, 12)


def test_vectors_act_at_the_places_of_drafts(drafting: Engine) -> None:
    """A draft stands where its token will stand; where it is not taken, another one stands there.

    What acts changes within a step of several tokens, for base, draft stream and both.
    """
    rng = random.Random(42)
    wheres = ("", "reply", {"from": 2}, {"first": 3}, {"from": 3, "first": 5}, "last_prompt")
    cases = []
    for where in wheres:
        own = json.dumps(where) if where else ""
        for spec, uses in (
            (CLOSE, (Use("vector", where=own), Use("chat-vector", 0.5, "chat", where=own))),
            (SAME, (Use("chat-vector", stream="chat", where=own), Use("vector", -1.0))),
            (CLOSE, (Use("reft", 0.7, where=own), Use("one", where=own))),
            (None, (Use("vector", where=own),)),
        ):
            ids = prompt(rng, 5, 60)
            cases.append(Case(ids, spec, max_tokens=12, arrives=rng.randrange(4), adapters=uses))
    before = accepted(drafting)
    assert_exact(drafting, cases, drafting.run(cases))
    drafts, kept = (after - was for after, was in zip(accepted(drafting), before, strict=True))
    assert 0 < kept < drafts
