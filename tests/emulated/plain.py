"""Answers of plain vLLM, without streams.

`python -m tests.emulated.plain FOLDER`, run in an ordinary process, prints V1's as JSON; `answers`,
called in an emulated process, gives V2's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.models import EOS

LENGTHS = (7, 40, 130)
"""Of the prompts, which run together; the last takes two steps to read."""

PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 3},
    "penalties": {"presence_penalty": 0.5, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {9: 5.0, 11: -2.0}},
    # Without `min_tokens` the bias would end each text at once.
    "min tokens": {"logit_bias": {EOS: 50.0}, "min_tokens": 4, "ignore_eos": False},
    "prompt logprobs": {"prompt_logprobs": 1},
    "top k 1": {"temperature": 1.0, "top_k": 1, "seed": 3},
    "regex": {"regex": "[ab]{3,5}", "ignore_eos": False},
    # Triton attention takes long in the interpreter.
    "short": {"lengths": (2, 9, 19)},
    "short penalties": {"lengths": (3, 17), "repetition_penalty": 1.2, "frequency_penalty": 0.3},
}
"""Name → sampling parameters; also a `regex`, and `lengths` other than the usual."""

Answers = dict[str, list[dict[str, Any]]]
"""By name, for each prompt: its `tokens`, their log-probabilities, those of the prompt."""


def engine(model: Path, **more: Any) -> Any:
    """An engine without streams, in this process."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "block_size": 32,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 96,
        "kv_cache_memory_bytes": 8 << 20,
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        "structured_outputs_config": {"backend": "xgrammar"},
    }
    return LLM(str(model), **{**settings, **more})


def runner(llm: Any) -> Any:
    """The model runner of an engine."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def answers(llm: Any, params: Mapping[str, dict[str, Any]] = PARAMS) -> Answers:
    """What it says to each set of parameters."""
    return {name: _answer(llm, dict(given)) for name, given in params.items()}


def _answer(llm: Any, given: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    if regex := given.pop("regex", None):
        given["structured_outputs"] = StructuredOutputsParams(regex=regex)
    lengths = given.pop("lengths", LENGTHS)
    defaults = {"max_tokens": 8, "ignore_eos": True, "logprobs": 0, "temperature": 0.0}
    params = SamplingParams(**{**defaults, **given})
    ids = [[8 + (i * 7) % 250 for i in range(n)] for n in lengths]
    prompts = [TokensPrompt(prompt_token_ids=one) for one in ids]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": _by_id(output.outputs[0].logprobs),
            "prompt": _by_id(output.prompt_logprobs or []),
        }
        for output in outputs
    ]


def _by_id(entries: list[Any]) -> list[dict[str, float]]:
    return [{str(i): e.logprob for i, e in sorted((one or {}).items())} for one in entries]


def ordinary(model: Path) -> subprocess.Popen[str]:
    """Starts an ordinary process that prints V1's answers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    command = [sys.executable, "-m", "tests.emulated.plain", str(model)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    llm = engine(Path(sys.argv[1]))
    print(json.dumps({"runner": type(runner(llm)).__mro__[1].__module__, **answers(llm)}))
