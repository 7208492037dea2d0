"""Checkpoints that also read images, served as their language part, against `transformers`."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steering.engine_args import adapter_engine_args
from tests.adapters.make import make_lora
from tests.engine.driver import Case, Engine, Use, logprobs, tokens
from tests.families.matrix import TOLERANCE, error
from tests.families.table import Row
from tests.family_models import WINDOW
from tests.models import SPECIAL, VOCAB_SIZE
from tests.tiers import mostly_nightly

pytestmark = pytest.mark.engine

IMAGE = 490
"""The image placeholder of the tests' models; ids from here on are special."""

ENGINES: dict[str, tuple[str, ...]] = {
    "gemma4-vision": ("mistral3", "qwen3-vl", "gemma3-vision", "internvl"),
    "llama4": ("qwen2-vl", "qwen2.5-vl", "llava"),
    "ministral3": ("qwen3-vl-moe", "llama4", "gemma4-vision"),
}
"""Base → companions."""

ADAPTED = "ministral3"
"""The base whose engine takes adapters."""


@pytest.fixture(scope="module", params=mostly_nightly(ENGINES, [ADAPTED]))
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Each base with its companions and a twin."""
    streams: dict[str, tuple[str, int] | str] = {
        f"c{i}": (name, VOCAB_SIZE) for i, name in enumerate(ENGINES[request.param])
    }
    folder = tmp_path_factory.mktemp("vision") / request.param
    slots = adapter_engine_args(2, 8) if request.param == ADAPTED else {}
    found = Engine(folder, (request.param, VOCAB_SIZE), {**streams, "twin": "base"}, **slots)
    yield found
    del found
    gc.collect()


def cases(companions: list[str]) -> list[Case]:
    """Prompts on both sides of the window, in one batch, joining at different steps."""
    rng = random.Random(3)

    def prompt(low: int, high: int) -> list[int]:
        return [rng.randrange(len(SPECIAL), IMAGE) for _ in range(rng.randint(low, high))]

    long, short = (2 * WINDOW + 10, 3 * WINDOW), (3, WINDOW - 10)
    guidance: dict[str, Any] = {"method": "guidance", "negative": "twin", "strength": 1.4}
    found = [
        Case(prompt(*long), max_tokens=8),
        Case(prompt(*short), max_tokens=8, arrives=2),
        Case(prompt(*short), guidance, {"twin": prompt(*long)}, max_tokens=8, arrives=1),
        Case(prompt(*long), guidance, {"twin": prompt(*short)}, max_tokens=8),
    ]
    for name in companions:
        mix: dict[str, Any] = {"method": "mix", "weights": {"base": 0.6, name: 0.7}}
        found.append(Case(prompt(*long), mix, max_tokens=8))
        found.append(Case(prompt(*short), mix, {name: prompt(*long)}, max_tokens=8, arrives=2))
    return found


def test_the_language_part_is_exact(engine: Engine, rows: dict[str, Row]) -> None:
    base = engine.folders["base"].parent.name
    companions = {f"c{i}": name for i, name in enumerate(ENGINES[base])}
    tried = cases([name for name in engine.folders if name != "base"])
    for case, output in zip(tried, engine.run(tried), strict=True):
        worst = error(engine, case, output)
        assert worst < TOLERANCE, case
        companion = next((name for c, name in companions.items() if c in str(case.spec)), None)
        role = "companion" if companion else "twin" if case.spec else "base"
        row = rows.setdefault(f"{companion or base} (language part)", Row())
        row.note(role, worst)


def test_an_image_placeholder_in_a_text_is_a_token_like_others(engine: Engine) -> None:
    """As `transformers` embeds it where no image is given."""
    if engine.folders["base"].parent.name != "ministral3":
        pytest.skip("one model is enough")
    case = Case([30, IMAGE, IMAGE, 31, 32], max_tokens=6)
    steps = engine.reference(case)
    (output,) = engine.run([case])
    assert tokens(output) == [s.token for s in steps]
    assert logprobs(output) == pytest.approx([s.logprob for s in steps], abs=TOLERANCE)


def test_an_adapter_of_the_whole_model_changes_its_language_part(
    engine: Engine, tmp_path: Path, rows: dict[str, Row]
) -> None:
    """Its layers have the names of the whole model, as PEFT writes them."""
    if engine.folders["base"].parent.name != ADAPTED:
        pytest.skip("one model is enough")
    language = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|down_proj)"
    engine.load_adapters(
        {"lora": make_lora(tmp_path, engine.folders["base"], seed=3, targets=language)}
    )
    plain, *others = (case for case in cases([]) if not case.spec)
    tried = [replace(case, adapters=(Use("lora", 0.8),)) for case in (plain, *others)]
    for case, output in zip(tried, engine.run(tried), strict=True):
        steps = engine.reference(case)
        assert tokens(output) == [s.token for s in steps]
        want = [s.logprob for s in steps]
        assert logprobs(output) == pytest.approx(want, abs=TOLERANCE)
        errors = [abs(a - b) for a, b in zip(logprobs(output), want, strict=True)]
        rows.setdefault(f"{ADAPTED} (language part)", Row()).note("adapters", max(errors))
    assert logprobs(engine.run([plain])[0]) != pytest.approx(want, abs=100 * TOLERANCE)


def test_no_tower_is_loaded(engine: Engine) -> None:
    """The engine's parameters are the language parts' alone."""
    model = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    names = [name for name, _ in model.model_runner.model.named_parameters()]
    assert names
    assert not [n for n in names if any(part in n for part in ("tower", "visual", "projector"))]
