"""Samples from a running Coxswain server, so the policy is exactly what is served.

The server gives the token ids of prompts and replies; nothing is tokenised here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from adapters.training.client import Peer, ask
from adapters.training.errors import BadRecipe
from adapters.training.journal import Journal
from adapters.training.prompts import Prompt

_OURS = ("prompt", "messages", "model", "n", "max_tokens", "temperature", "top_p", "seed", "stream",
         "return_token_ids", "echo")  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A server and how it is asked.

    Args:
        url: its address, without a path, e.g. `http://127.0.0.1:8000`.
        key: an API key; None where it asks for none.
        model: what requests call the model: the base, a profile or an adapter; None: the base.
        fields: further fields of each request, e.g. `steering` and `adapters`.
        concurrency: requests at a time; ≥ 1.
        timeout_s: seconds that one request may take; > 0.
        patience_s: seconds for which a request that finds no room or no server is tried again.
    """

    url: str
    key: str | None = None
    model: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout_s: float = 600.0
    patience_s: float = 300.0

    @property
    def peer(self) -> Peer:
        """The same as a peer."""
        return Peer(
            self.url,
            "--server",
            "a running server: `coxswain serve CONFIG.yaml`",
            self.key,
            self.timeout_s,
            self.patience_s,
            self.concurrency,
        )


@dataclass(frozen=True)
class Sample:
    """One reply.

    Args:
        prompt: ids that the base read.
        reply: ids that were drawn; the id that ended the text is among them.
        text: the reply without special tokens.
        ended: whether the model ended it; else `max_tokens` or a stop string did.
    """

    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    text: str
    ended: bool


def check(served: Served) -> None:
    """Raises BadRecipe where the server cannot be asked: it is not there, or refuses the key."""
    if taken := sorted(set(_OURS) & set(served.fields)):
        raise BadRecipe(
            "set by other flags", field=f"--request: {taken[0]}", allowed="other fields"
        )
    served.peer.check()

    async def hello() -> None:
        async with served.peer.client() as client:
            await ask(client, served.peer, "GET", "/v1/models", None, "--server", patient=False)

    asyncio.run(hello())


def sample(
    served: Served,
    prompts: Sequence[Prompt],
    *,
    per_prompt: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    file: Path,
    progress: str,
) -> list[Sample]:
    """Draws replies, or goes on where a killed run has stopped.

    Args:
        served: the server.
        prompts: what is replied to.
        per_prompt: replies for each; ≥ 1.
        max_tokens: ids in the longest reply; ≥ 1.
        temperature: > 0, or 0 with one reply for each prompt.
        top_p: above 0, up to 1.
        seed: each request has a seed of its own, which follows from this and the prompt's place.
        file: JSONL; holds what is finished, a line for each prompt.
        progress: title of the bar.

    Returns:
        The replies, `per_prompt` for the first prompt, then for the second, and so on.

    Raises:
        BadRecipe: the server refuses a prompt, or does not answer; or `file` is of another run.
    """
    asked = {
        **served.fields,
        "n": per_prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "return_token_ids": True,
    }
    if served.model is not None:
        asked["model"] = served.model
    bodies = [{**p.body, **asked, "seed": _seed(seed, i)} for i, p in enumerate(prompts)]
    with Journal(file) as journal:
        done = _finished(journal, bodies, file)
        left = iter([i for i in range(len(bodies)) if i not in done])
        bar = tqdm(total=len(bodies), initial=len(done), desc=progress, unit="prompt", disable=None)
        with bar:
            asyncio.run(_all(served, prompts, bodies, left, journal, bar))
        rows = sorted(journal.entries, key=lambda entry: entry["index"])
    return [
        Sample(tuple(row["prompt"]), tuple(reply["ids"]), reply["text"], reply["ended"])
        for row in rows
        for reply in row["replies"]
    ]


def _seed(seed: int, index: int) -> int:
    """Far apart: vLLM counts up from it for the replies to one prompt."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _finished(journal: Journal, bodies: Sequence[Mapping[str, Any]], file: Path) -> set[int]:
    for entry in journal.entries:
        index = entry.get("index")
        if not (
            isinstance(index, int)
            and 0 <= index < len(bodies)
            and entry.get("request") == _digest(bodies[index])
        ):
            raise BadRecipe(
                "holds samples of other prompts or settings",
                field=str(file),
                allowed="the same as before, or remove the file to start again",
            )
    return {entry["index"] for entry in journal.entries}


async def _all(
    served: Served,
    prompts: Sequence[Prompt],
    bodies: Sequence[Mapping[str, Any]],
    left: Iterator[int],
    journal: Journal,
    bar: Any,
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for index in left:
            body, where = bodies[index], prompts[index].where
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            answer = await ask(client, served.peer, "POST", path, body, where)
            entry = {"index": index, "request": _digest(body), **_replies(answer, body, where)}
            journal.add(entry)
            bar.update()

    async with served.peer.client() as client:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(served.concurrency):
                    group.create_task(work(client))
        except ExceptionGroup as errors:  # The first has ended the others.
            raise errors.exceptions[0] from None


def _replies(answer: Any, body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What is kept of an answer."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        first = answer if "messages" in body else choices[0]
        prompt = [int(i) for i in first["prompt_token_ids"]]
        replies = [_reply(choice) for choice in choices]
        if len(replies) != body["n"] or not all(reply["ids"] for reply in replies):
            raise ValueError(f"{len(replies)} replies")
    except (LookupError, TypeError, ValueError) as error:
        raise BadRecipe(
            "the answer lacks the replies, or their token ids",
            field=where,
            allowed="a Coxswain server",
        ) from error
    return {"prompt": prompt, "replies": replies}


def _reply(choice: Mapping[str, Any]) -> dict[str, Any]:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    by_model = choice["finish_reason"] == "stop" and not isinstance(choice["stop_reason"], str)
    return {"ids": [int(i) for i in choice["token_ids"]], "text": text or "", "ended": by_model}
