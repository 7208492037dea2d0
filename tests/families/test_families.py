"""Every family of the matrix, as base, twin and companion and with adapters, as `transformers`."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.driver import Case, Engine, logprobs, tokens
from tests.families import matrix
from tests.families.table import Row, states
from tests.models import SPECIAL, VOCAB_SIZE
from tests.tiers import mostly_nightly

pytestmark = pytest.mark.engine

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "model-families.md"


@pytest.mark.parametrize("family", mostly_nightly(matrix.FAMILIES, matrix.ONE_OF_EACH))
def test_a_family_is_exact(family: str, tmp_path: Path, rows: dict[str, Row]) -> None:
    engine = matrix.engine_of(family, tmp_path)
    try:
        errors = matrix.errors(engine, 5)
    finally:
        del engine
        gc.collect()
    companion = rows.setdefault(matrix.companion_of(family), Row())
    companion.errors["companion"] = errors["companion"]
    own = {role: error for role, error in errors.items() if role != "companion"}
    rows.setdefault(family, Row()).errors.update(own)
    assert max(errors.values()) < matrix.TOLERANCE, errors


REFUSED = ("deepseek-v2", "deepseek-v3")


@pytest.mark.parametrize("role", ["base", "companion"])
@pytest.mark.parametrize("family", mostly_nightly(REFUSED, REFUSED[1:]))
def test_a_family_is_refused(family: str, role: str, tmp_path: Path, rows: dict[str, Row]) -> None:
    pair = [(family, VOCAB_SIZE), ("llama", VOCAB_SIZE)]
    base, other = pair if role == "base" else pair[::-1]
    with pytest.raises(Exception, match="multi-head latent attention") as found:
        Engine(tmp_path, base, {"other": other})
    rows[family] = Row(refused=str(found.value).split(": ", 1)[1])


def test_a_twin_of_a_model_that_shares_keys_between_layers(tmp_path: Path) -> None:
    """Gemma 3n: keyword-only arguments, and layers that read the KV of earlier ones.

    vLLM's own model is not `transformers`' to 1e-4, so a twin is held to the base on its prompt.
    """
    engine = Engine(tmp_path, ("gemma3n", VOCAB_SIZE), {"twin": "base", "other": ("llama", 500)})
    rng = random.Random(4)
    prompts = [[rng.randrange(len(SPECIAL), VOCAB_SIZE) for _ in range(n)] for n in (90, 30, 120)]
    twin: dict[str, Any] = {"method": "mix", "weights": {"base": 0.0, "twin": 1.0}}
    plain = engine.run([Case(p, max_tokens=8) for p in prompts])
    others = prompts[1:] + prompts[:1]
    cases = [Case(o, twin, {"twin": p}, 8) for p, o in zip(prompts, others, strict=True)]
    for want, got in zip(plain, engine.run(cases), strict=True):
        assert tokens(got) == tokens(want)
        assert logprobs(got) == pytest.approx(logprobs(want), abs=matrix.TOLERANCE)


def test_the_page_says_what_was_measured(
    request: pytest.FixtureRequest, rows: dict[str, Row]
) -> None:
    if request.config.getoption("--families-table", None) is not None:
        pytest.skip("the page is being written")
    page = states(PAGE.read_text())
    assert {name: row.state() for name, row in rows.items()}.items() <= page.items()
    assert {*matrix.FAMILIES, *REFUSED} <= page.keys()
