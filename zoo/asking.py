"""Asks a running Coxswain server many things at a time, and reads its answers."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from zoo.table import Reply
from zoo.value_table import Measured

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """Where the questions go, and how many may be under way at a time."""

    url: str
    key: str
    concurrency: int

    def ask(
        self,
        path: str,
        requests: Sequence[dict[str, Any]],
        read: Callable[[Any], T],
        bar: Any,
    ) -> list[T]:
        """What ``read`` makes of the answers, in the order of the requests."""
        return asyncio.run(self._ask(path, requests, read, bar))

    async def _ask(
        self, path: str, requests: Sequence[dict[str, Any]], read: Callable[[Any], T], bar: Any
    ) -> list[T]:
        gate = asyncio.Semaphore(self.concurrency)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120.0) as client:

            async def one(request: dict[str, Any]) -> T:
                async with gate:
                    response = await client.post(path, json=request)
                if response.is_error:
                    raise SystemExit(f"the server answered {response.status_code}: {response.text}")
                bar.update()
                return read(response.json())

            return list(await asyncio.gather(*map(one, requests)))


def replies_of(answer: Any) -> list[Reply]:
    """The replies of a completion, chat or text."""
    return [
        Reply(_text(choice) or "", ended=choice["finish_reason"] == "stop")
        for choice in answer["choices"]
    ]


def _text(choice: Any) -> Any:
    return choice["message"]["content"] if "message" in choice else choice["text"]


def reply_of(answer: Any) -> Reply:
    """The first of them."""
    return replies_of(answer)[0]


def texts_of(answer: Any) -> tuple[list[str], int]:
    """The texts of a completion, and how many tokens they have together."""
    texts = [choice["text"] for choice in answer["choices"]]
    return texts, answer["usage"]["completion_tokens"]


def measured_of(answer: Any) -> Measured:
    """The first text of a completion, with what its report says was done for it."""
    report = answer["steering"]
    tokens = answer["usage"]["completion_tokens"]
    return Measured(
        answer["choices"][0]["text"],
        (report["mean_kl"] or 0.0) * tokens,
        report.get("best_of_n", {}).get("generated_tokens", tokens),
        report["forward_passes_per_token"],
    )
