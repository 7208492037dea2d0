"""Asks a running Coxswain server the zoo's test questions and prints the score tables.

``python -m zoo.evaluate --url http://127.0.0.1:8000``; the server runs ``zoo/server.yaml``.
Every request goes to ``/v1/chat/completions`` and names its own steering, or its adapters.
"""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from zoo import routing_table
from zoo.conversations import (
    LENGTHS,
    MAX_TOKENS,
    Asked,
    Conversation,
    hold,
    path_of,
    read_conversations,
)
from zoo.questions import FOLDER, read_questions
from zoo.routing_table import SETTINGS, Result, Setting
from zoo.table import ROWS, Reply, Row, markdown
from zoo.world import Question

MODEL = "base"


def body(row: Row, question: Question, seed: int) -> dict[str, Any]:
    """The chat-completions request for one question under one row's steering."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": question.question}],
        "temperature": row.temperature,
        "seed": seed,
        "max_tokens": row.max_tokens,
        "steering": row.steering,
    }


def adapted_body(setting: Setting, asked: Asked) -> dict[str, Any]:
    """The chat-completions request for one turn of a conversation."""
    request = {
        "model": asked.task if setting.by_hand else MODEL,
        "messages": asked.messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    return {**request, "adapters": list(setting.adapters)} if setting.adapters else request


async def ask(client: httpx.AsyncClient, request: dict[str, Any]) -> Reply:
    """One reply."""
    response = await client.post("/v1/chat/completions", json=request)
    if response.is_error:
        raise SystemExit(f"the server answered {response.status_code}: {response.text}")
    choice = response.json()["choices"][0]
    return Reply(choice["message"]["content"] or "", ended=choice["finish_reason"] == "stop")


@dataclass(frozen=True)
class Server:
    """Where the questions go, and how many may be under way at a time."""

    url: str
    key: str
    concurrency: int

    async def answer(self, requests: Sequence[dict[str, Any]], bar: Any) -> list[Reply]:
        """The replies, in the order of the requests."""
        gate = asyncio.Semaphore(self.concurrency)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120.0) as client:

            async def one(request: dict[str, Any]) -> Reply:
                async with gate:
                    reply = await ask(client, request)
                bar.update()
                return reply

            return list(await asyncio.gather(*map(one, requests)))


def measure(server: Server, questions: list[Question]) -> list[tuple[Row, list[Reply]]]:
    """The replies of every row of the steering table."""
    results = []
    with tqdm(total=len(ROWS) * len(questions), desc="steering", unit="request") as bar:
        for row in ROWS:
            requests = [body(row, question, seed) for seed, question in enumerate(questions)]
            results.append((row, asyncio.run(server.answer(requests, bar))))
    return results


def converse(server: Server, conversations: Sequence[Conversation]) -> list[Result]:
    """The replies of every setting of the adapters' table."""
    results: list[Result] = []
    turns = sum(map(len, conversations))
    with tqdm(total=len(SETTINGS) * turns, desc="adapters", unit="request") as bar:
        for setting in SETTINGS:

            def answer(asked: Sequence[Asked], setting: Setting = setting) -> list[Reply]:
                return asyncio.run(server.answer([adapted_body(setting, a) for a in asked], bar))

            results.append((setting, hold(conversations, answer)))
    return results


def main() -> None:
    """Parse the arguments, ask, print."""
    parser = argparse.ArgumentParser(prog="python -m zoo.evaluate", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="API key, if the server wants one")
    parser.add_argument("--questions", type=Path, default=FOLDER / "test.jsonl")
    parser.add_argument("--conversations", type=Path, default=path_of("test"))
    parser.add_argument(
        "--count", type=int, help="only the first so many questions, and conversations of a length"
    )
    parser.add_argument("--only", choices=("steering", "adapters"), help="one table, not both")
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    server = Server(args.url, args.key, args.concurrency)
    if args.only != "adapters":
        questions = read_questions(args.questions)[: args.count]
        print(markdown(measure(server, questions), questions))
    if args.only != "steering":
        conversations = first(read_conversations(args.conversations), args.count)
        print("\n" + routing_table.markdown(conversations, converse(server, conversations)))


def first(conversations: Sequence[Conversation], count: int | None) -> list[Conversation]:
    """The first so many conversations of every length; all of them without a count."""
    return [
        items
        for length in LENGTHS
        for items in [c for c in conversations if len(c) == length][:count]
    ]


if __name__ == "__main__":
    main()
