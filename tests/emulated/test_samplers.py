"""What vLLM's V2 sampler offers beside steering: logits processors and watermarks stay usable."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from tests.emulated.plain import runner
from tests.engine.driver import Case, Engine, tokens
from tests.engine.test_exactness import assert_exact, prompt
from tests.models import VOCAB_SIZE, make_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

MIX: dict[str, Any] = {"method": "mix", "weights": {"base": 1.0, "chat": 1.5}}


class Forbid(LogitsProcessor):
    """Forbids the id that a request names in `extra_args`."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._ids = torch.full((req_states.max_num_reqs,), -1, dtype=torch.int64)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Whether the request forbids anything."""
        named = (sampling_params.extra_args or {}).get("forbid", -1)
        self._ids[req_idx] = named
        return bool(named >= 0)

    def apply_staged_writes(self) -> None:
        """Nothing: the ids are on the host, which here is the device."""

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """−∞ where a row's request forbids an id."""
        for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            if (named := int(self._ids[slot])) >= 0:
                logits[row, named] = float("-inf")
        return logits


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(
        tmp_path_factory.mktemp("models"),
        ("llama", VOCAB_SIZE),
        {"chat": ("qwen2", VOCAB_SIZE)},
        logits_processors=[Forbid],
        watermark_config={"key": 7, "context_width": 2, "deduplicate_contexts": "none"},
        reasoning_config={"reasoning_start_str": "[", "reasoning_end_str": "]"},
    )
    yield found
    del found
    gc.collect()


def test_a_logits_processor_acts_on_the_steered_scores(engine: Engine) -> None:
    rng = random.Random(41)
    cases = [Case(prompt(rng, 9, 30), MIX, max_tokens=6), Case(prompt(rng, 9, 30), max_tokens=6)]
    outputs = engine.run(cases)
    assert_exact(engine, cases, outputs)
    first = tokens(outputs[0])[0]
    forbidding = Case(cases[0].prompt, MIX, max_tokens=6, params={"extra_args": {"forbid": first}})
    drawn = tokens(engine.run([forbidding])[0])
    second = engine.reference(cases[0])[0]
    assert first == second.token and first not in drawn


def test_a_thinking_budget_ends_the_steered_thinking(engine: Engine) -> None:
    """The end is forced after so many tokens; what is drawn before and after is steered."""
    begin, end = (make_tokenizer().encode(mark, add_special_tokens=False) for mark in "[]")
    rng, budget = random.Random(43), 3
    ids = [i for i in prompt(rng, 20, 20) if i not in (*begin, *end)] + begin
    plain = Case(ids, MIX, max_tokens=8)
    thinking = Case(ids, MIX, max_tokens=8, params={"thinking_token_budget": budget})
    free, ended = (tokens(output) for output in engine.run([plain, thinking]))
    assert end[0] not in free
    assert ended[:budget] == free[:budget] and ended[budget : budget + len(end)] == end
    drawn = iter(ended)
    steps = engine.reference(thinking, choose=lambda _: next(drawn), keep_logprobs=True)
    for step, token in list(zip(steps, ended, strict=True))[budget + len(end) :]:
        assert step.logprobs is not None and token == int(step.logprobs.argmax())


def test_a_watermark_decides_the_steered_draws(engine: Engine) -> None:
    """Its pseudo-random function does, so equal requests without a seed draw the same."""
    from vllm.v1.watermarking.gpu_sampler import GPUWatermarkSampler

    assert isinstance(runner(engine.llm).sampler, GPUWatermarkSampler)
    ids = prompt(random.Random(42), 12, 12)
    sampled = {"temperature": 1.0, "logprobs": None}
    marked = Case(ids, MIX, max_tokens=16, params=sampled)
    free = Case(ids, MIX, max_tokens=16, params={**sampled, "watermarking": False})
    first, again, other, more = (tokens(o) for o in engine.run([marked, marked, free, free]))
    assert first == again
    assert other != more
