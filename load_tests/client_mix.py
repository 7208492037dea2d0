"""Several plain vLLM servers, mixed token by token.

    python -m load_tests.client_mix PORT MODEL URL WEIGHT …

What can be done with vLLM as it is: each token asks every server for one token's most likely ids
with their log-probabilities, mixes the lists, takes the best, and asks again with it appended. The
servers' prefix caches keep the cost of that to the last block of the text.

An approximation of Σ w_i log p_i: a server tells its `TOP` most likely ids only. Candidates are the
ids that any server returned; where one did not return a candidate, its least likely returned one
stands in.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import httpx
from transformers import AutoTokenizer

from load_tests.completions_server import application, serve

TOP = 20
"""vLLM's own limit on log-probabilities per token, unless a server is configured otherwise."""


def best(returned: Sequence[Mapping[int, float]], weights: Sequence[float]) -> int:
    """The id with the largest mixed score; of equal ones the smallest.

    Args:
        returned: per server, id → log-probability of its most likely ids; none empty.
        weights: w_i.
    """
    floors = [min(own.values()) for own in returned]

    def score(token: int) -> float:
        parts = zip(returned, weights, floors, strict=True)
        return sum(weight * own.get(token, floor) for own, weight, floor in parts)

    return max(sorted({token for own in returned for token in own}), key=score)


class Mixed:
    """A client of several servers.

    Args:
        urls: of the servers, which all call their model `base`.
        weights: w_i.
        top: how many ids each tells.
    """

    def __init__(self, urls: Sequence[str], weights: Sequence[float], top: int = TOP) -> None:
        self._urls, self._weights, self._top = urls, weights, top
        self._http = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))

    async def generate(self, prompt: list[int], count: int) -> AsyncIterator[int]:
        """The tokens of one request."""
        text = list(prompt)
        for _ in range(count):
            returned = await asyncio.gather(*(self._ask(url, text) for url in self._urls))
            text.append(best(returned, self._weights))
            yield text[-1]

    async def _ask(self, url: str, text: list[int]) -> dict[int, float]:
        body = {
            "model": "base",
            "prompt": text,
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": self._top,
            "return_tokens_as_token_ids": True,
        }
        answer = await self._http.post(f"{url}/v1/completions", json=body)
        answer.raise_for_status()
        (returned,) = answer.json()["choices"][0]["logprobs"]["top_logprobs"]
        return {int(name.removeprefix("token_id:")): value for name, value in returned.items()}


def main() -> None:
    """Serves the mixture; MODEL is the folder with the tokenizer."""
    port, folder, *rest = sys.argv[1:]
    mixed = Mixed(rest[::2], [float(weight) for weight in rest[1::2]])
    serve(application(AutoTokenizer.from_pretrained(Path(folder)), mixed.generate), int(port))


if __name__ == "__main__":
    main()
