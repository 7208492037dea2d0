"""Drafts beside heads and adapters: what the draft stream does not know of, and what changes it."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from steering.engine_args import Speculation, adapter_engine_args
from tests.adapters.make import make_lora
from tests.engine.driver import Case, Engine, Use
from tests.engine.heads import Headed, classifier, probe, valued
from tests.engine.test_exactness import prompt
from tests.engine.test_heads import CRITICAL, VALUE, assert_exact
from tests.engine.test_speculation import CLOSE, SAME
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
        **adapter_engine_args(4, 48),
    )
    found.load_adapters({"one": make_lora(folder / "one", found.folders["base"], seed=1)})
    chat = make_lora(folder / "lora-chat", found.folders["chat"], seed=3)
    found.load_adapters({"chat": chat}, "chat")
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
