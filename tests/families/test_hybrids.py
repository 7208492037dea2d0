"""Hybrids as the base, beside companions of attention alone, against `transformers`."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.platforms import current_platform

from steering.engine_args import Speculation, StreamSource, steered_engine_args
from steering.errors import DoesNotFit
from tests.engine.driver import Case, Engine
from tests.families.matrix import TOLERANCE, error
from tests.families.table import Row
from tests.hybrid_models import HYBRIDS
from tests.models import SPECIAL, VOCAB_SIZE, make_model
from tests.tiers import mostly_nightly

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=mostly_nightly(HYBRIDS, ["granite4"]))
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Each hybrid with two companions; prompts are read in chunks."""
    if not current_platform.is_cpu():
        pytest.skip("refused on this platform")
    streams: dict[str, tuple[str, int] | str] = {
        "qwen": ("qwen2", VOCAB_SIZE),
        "gpt": ("gpt2", VOCAB_SIZE),
    }
    folder = tmp_path_factory.mktemp("hybrid")
    found = Engine(folder, (request.param, VOCAB_SIZE), streams, block_size=None)
    yield found
    del found
    gc.collect()


def cases() -> list[Case]:
    """Rows that need the base, and rows that do not, in the same steps."""
    rng = random.Random(4)

    def prompt(low: int, high: int) -> list[int]:
        return [rng.randrange(len(SPECIAL), VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    mix: dict[str, Any] = {"method": "mix", "weights": {"base": 0.6, "qwen": 0.7, "gpt": -0.2}}
    without: dict[str, Any] = {"method": "mix", "weights": {"base": 0.0, "qwen": 1.0}}
    contrastive: dict[str, Any] = {
        "method": "contrastive", "amateur": "gpt", "strength": 0.5, "plausibility": 0.1,
    }  # fmt: skip
    return [
        Case(prompt(150, 200), max_tokens=12),
        Case(prompt(3, 30), max_tokens=20, arrives=2),
        Case(prompt(100, 120), mix, max_tokens=12),
        Case(prompt(40, 60), mix, {"qwen": prompt(5, 30), "gpt": prompt(5, 30)}, 12, 1),
        Case(prompt(130, 150), without, max_tokens=12, arrives=3),
        Case(prompt(2, 9), contrastive, max_tokens=12, arrives=5, report="tokens"),
        Case(prompt(130, 150), mix, {"qwen": prompt(90, 120)}, 12, 9),
    ]


def test_a_hybrid_base_is_exact(engine: Engine, rows: dict[str, Row], request: Any) -> None:
    row = rows.setdefault(f"{request.node.callspec.params['engine']} (hybrid)", Row())
    tried = cases()
    for case, output in zip(tried, engine.run(tried), strict=True):
        worst = error(engine, case, output)
        assert worst < TOLERANCE, case
        row.note("base", worst)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid's folder."""
    return make_model(tmp_path_factory.mktemp("refused") / "granite4", "granite4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model's folder."""
    return make_model(tmp_path_factory.mktemp("refused") / "llama", "llama")


def test_what_a_hybrid_cannot_be_is_refused_by_name(hybrid: Path, plain: Path) -> None:
    name = "GraniteMoeHybridForCausalLM"
    with pytest.raises(DoesNotFit, match=f"streams.other.model: {name} is recurrent.* base"):
        steered_engine_args(str(plain), {"other": StreamSource(str(hybrid))})
    with pytest.raises(DoesNotFit, match=f"model: {name} .*'twin'"):
        steered_engine_args(str(hybrid), {"twin": StreamSource(same_as="base")})
    beside = {"other": StreamSource(str(plain))}
    with pytest.raises(DoesNotFit, match=f"model: {name} .*speculation"):
        steered_engine_args(str(hybrid), beside, speculation=Speculation("other", 2))
    with pytest.raises(DoesNotFit, match=f"model: {name} .*adapters"):
        steered_engine_args(str(hybrid), beside, enable_lora=True)
    with pytest.raises(DoesNotFit, match=f"model: {name} .*enable_prefix_caching"):
        steered_engine_args(str(hybrid), beside, enable_prefix_caching=True)
