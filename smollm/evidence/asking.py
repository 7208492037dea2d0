"""Asks a server many things at a time, and measures replies: log-probabilities, diversity."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MODEL = "smollm"
AT_ONCE = 16
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Reply:
    """One reply, and what its report says.

    `kl`: mean over its tokens of KL(steered ‖ base), in nats; 0 without a report.
    `passes`: forward passes per token, by stream.
    """

    text: str
    ended: bool
    ids: tuple[int, ...]
    kl: float
    passes: dict[str, float]


def ask(url: str, path: str, bodies: Sequence[dict[str, Any]], at_once: int = AT_ONCE) -> list[Any]:
    """The answers of a path to many requests, in their order.

    Raises:
        RuntimeError: the server refused one; has its reason.
    """
    return asyncio.run(_ask(url, path, bodies, at_once))


async def _ask(url: str, path: str, bodies: Sequence[dict[str, Any]], at_once: int) -> list[Any]:
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:

        async def one(body: dict[str, Any]) -> Any:
            async with gate:
                response = await client.post(path, json={"model": MODEL, **body})
            if response.is_error:
                raise RuntimeError(f"{path} answered {response.status_code}: {response.text}")
            return response.json()

        return await asyncio.gather(*map(one, bodies))


def replies(url: str, path: str, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
    """The first reply to each request, greedy unless a request says otherwise.

    Args:
        url: of the server.
        path: `CHAT` or `TEXT`.
        bodies: requests without `model`.

    Raises:
        RuntimeError: the server refused one.
    """
    asked = [{"temperature": 0, "return_token_ids": True, **body} for body in bodies]
    return [reply_of(answer) for answer in ask(url, path, asked)]


def reply_of(answer: Any) -> Reply:
    """The first reply of an answer of either path."""
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    report = answer.get("steering") or {}
    return Reply(
        text or "",
        choice["finish_reason"] == "stop",
        tuple(choice.get("token_ids") or ()),
        report.get("mean_kl") or 0.0,
        report.get("forward_passes_per_token") or {},
    )


def log_probs(
    url: str, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The plain base's log-probability, in nats, of every token of a text after its prompt.

    Args:
        url: of the server.
        prompts: token ids; each has at least one.
        texts: token ids, one list for each prompt; an empty one has no log-probabilities.

    Raises:
        RuntimeError: the server refused one.
    """
    places = [i for i, text in enumerate(texts) if text]
    bodies = [
        {
            "prompt": [*prompts[i], *texts[i]],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        for i in places
    ]
    found: list[list[float]] = [[] for _ in texts]
    for i, answer in zip(places, ask(url, TEXT, bodies), strict=True):
        rows = answer["choices"][0]["prompt_logprobs"][len(prompts[i]) :]
        found[i] = [
            float(row[str(token)]["logprob"]) for row, token in zip(rows, texts[i], strict=True)
        ]
    return found


def perplexity(found: Sequence[Sequence[float]]) -> float:
    """The exponential of the mean negative log-probability over all tokens of all texts."""
    values = [value for one in found for value in one]
    return math.exp(-sum(values) / len(values)) if values else math.nan


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all of them (Li et al. 2016, arXiv 1510.03055), 0 to 1."""
    grams = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
