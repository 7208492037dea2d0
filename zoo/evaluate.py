"""Asks a running Coxswain server the zoo's test questions and prints the score table.

``python -m zoo.evaluate --url http://127.0.0.1:8000``; the server runs ``zoo/server.yaml``.
Every request goes to ``/v1/chat/completions`` for the base and names its own steering.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from zoo.questions import FOLDER, read_questions
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


async def ask(client: httpx.AsyncClient, request: dict[str, Any]) -> Reply:
    """One reply."""
    response = await client.post("/v1/chat/completions", json=request)
    if response.is_error:
        raise SystemExit(f"the server answered {response.status_code}: {response.text}")
    choice = response.json()["choices"][0]
    return Reply(choice["message"]["content"] or "", ended=choice["finish_reason"] == "stop")


async def measure(
    url: str, key: str, questions: list[Question], concurrency: int
) -> list[tuple[Row, list[Reply]]]:
    """The replies of every row, at most ``concurrency`` requests at a time."""
    gate = asyncio.Semaphore(concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120.0) as client:
        with tqdm(total=len(ROWS) * len(questions), unit="request") as bar:

            async def one(row: Row, seed: int) -> Reply:
                async with gate:
                    reply = await ask(client, body(row, questions[seed], seed))
                bar.update()
                return reply

            results = []
            for row in ROWS:
                replies = await asyncio.gather(*(one(row, i) for i in range(len(questions))))
                results.append((row, list(replies)))
    return results


def main() -> None:
    """Parse the arguments, ask, print."""
    parser = argparse.ArgumentParser(prog="python -m zoo.evaluate", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="API key, if the server wants one")
    parser.add_argument("--questions", type=Path, default=FOLDER / "test.jsonl")
    parser.add_argument("--count", type=int, default=None, help="only the first so many questions")
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    questions = read_questions(args.questions)[: args.count]
    results = asyncio.run(measure(args.url, args.key, questions, args.concurrency))
    print(markdown(results, questions))


if __name__ == "__main__":
    main()
