"""Quantised checkpoints as base and companions, against vLLM alone on the same checkpoint."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from steering.engine_args import StreamSource, steered_engine_args
from steering.plan import BASE, SteeringPlan
from steering.wire import SteeringPayload, pack
from tests.engine.driver import BLOCK, logprobs, tokens
from tests.families.table import Row
from tests.models import SPECIAL, VOCAB_SIZE, make_model
from tests.quantised import SCHEMES, make_quantised
from tests.tiers import mostly_nightly

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5
"""Nats: the same kernels on the same numbers."""

ENGINES: dict[str, tuple[str, dict[str, str]]] = {
    "float32": ("plain", {s: s for s in ("int8", "int8-asymmetric")}),
    "bfloat16": (
        "gptq",
        {**dict.fromkeys(("gptq", "awq", "w4a16", "auto-round"), "gptq"), "plain": "plain"},
    ),
}
"""dtype → base, and companions with the checkpoint whose numbers they have."""

Found = tuple[list[int], list[float]]


def prompts() -> list[list[int]]:
    """Longer and shorter than a block and than a step."""
    rng = random.Random(5)
    lengths = (4, BLOCK + 3, 150)
    return [[rng.randrange(len(SPECIAL), VOCAB_SIZE) for _ in range(n)] for n in lengths]


def run(engine: Any, weights: Mapping[str, float] | None = None) -> list[Found]:
    """(ids, log-probabilities) of each prompt's greedy response, all in one batch."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0.0, max_tokens=10, logprobs=0, ignore_eos=True)
    salt = None
    if weights is not None:
        plan = SteeringPlan("mix", weights=tuple(weights.items()))
        params.extra_args, salt = pack(SteeringPayload(plan, 0, "", 0)), plan.cache_key(0)
    asked = [TokensPrompt(prompt_token_ids=ids, cache_salt=salt) for ids in prompts()]
    outputs = engine.generate(asked, params, use_tqdm=False)
    return [(tokens(output), logprobs(output)) for output in outputs]


def start(dtype: str, arguments: Mapping[str, Any]) -> Any:
    """An engine, ours or vLLM's alone."""
    from vllm import LLM

    common: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": 256,
        "block_size": BLOCK,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 96,
        "kv_cache_memory_bytes": 64 << 20,
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
    }
    engine = LLM(**{**common, **arguments})
    if "additional_config" in arguments:
        engine.collective_rpc("coxswain_bind")
    return engine


def difference(got: Sequence[Found], wanted: Sequence[Found], what: str) -> float:
    """The largest of a log-probability; ids and log-probabilities are the same."""
    worst = 0.0
    for (ids, scores), (want_ids, want) in zip(got, wanted, strict=True):
        assert ids == want_ids, what
        assert scores == pytest.approx(want, abs=TOLERANCE), what
        worst = max(worst, *(abs(a - b) for a, b in zip(scores, want, strict=True)))
    return worst


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Scheme → checkpoint; all of the same model."""
    root = tmp_path_factory.mktemp("quantised")
    made = {name: make_quantised(root / name, name) for name in SCHEMES if name != "fp8"}
    return {**made, "plain": make_model(root / "plain", "llama")}


@pytest.fixture(scope="module", params=mostly_nightly(ENGINES, ["float32"]))
def both(request: Any, folders: Mapping[str, Path]) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """(our engine, checkpoint → what vLLM alone answers, dtype)."""
    base, companions = ENGINES[request.param]
    alone = {}
    for name in dict.fromkeys((base, *companions.values())):
        engine = start(request.param, {"model": str(folders[name])})
        alone[name] = run(engine)
        del engine
        gc.collect()
    sources = {name: StreamSource(str(folders[name])) for name in companions}
    sources["twin"] = StreamSource(same_as=BASE)
    engine = start(request.param, steered_engine_args(str(folders[base]), sources))
    yield engine, alone, request.param
    del engine
    gc.collect()


def test_each_stream_is_what_its_checkpoint_is(
    both: tuple[Any, dict[str, Any], str], rows: dict[str, Row]
) -> None:
    engine, alone, dtype = both
    base, companions = ENGINES[dtype]

    def note(name: str, role: str, numbers: str, found: list[Found]) -> None:
        error = difference(found, alone[numbers], f"{role} {name}")
        if name != "plain":
            rows.setdefault(f"{name} (quantised, {dtype})", Row()).note(role, error)

    note(base, "base", base, run(engine))
    note(base, "twin", base, run(engine, {BASE: 0.0, "twin": 1.0}))
    for name, numbers in companions.items():
        note(name, "companion", numbers, run(engine, {BASE: 0.0, name: 1.0}))


def test_quantising_changes_the_answers(both: tuple[Any, dict[str, Any], str]) -> None:
    """Else the test above could not fail."""
    _, alone, _ = both
    answers = [str(scores) for _, scores in (found[1] for found in alone.values())]
    assert len(set(answers)) == len(answers)
