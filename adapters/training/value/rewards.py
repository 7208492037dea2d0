"""Rewards of sampled replies: one number each, from a function, a classifier or a server.

    FILE.py:FUNCTION     called with (prompt, reply), in another process; returns a number
    FOLDER               a sequence classifier: its logit, or of two labels log p₂ − log p₁
    http(s)://…          POST {"prompt": …, "reply": "…"} → {"reward": number}

The prompt is a text, or a list of messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
from tqdm import tqdm

from adapters.training.called import Called
from adapters.training.client import Peer, ask
from adapters.training.errors import BadRecipe
from adapters.training.journal import Journal
from adapters.training.prompts import Prompt
from adapters.training.served import Sample
from adapters.training.value.reward_model import RewardModel

_CONNECTIONS = 8


@dataclass(frozen=True)
class Item:
    """What gets a reward.

    Args:
        where: file and line of the prompt, and which sample it is; for errors.
        prompt: text or messages.
        reply: text.
    """

    where: str
    prompt: str | list[dict[str, str]]
    reply: str


Keep = Callable[[int, object], None]
"""Takes an index and what was given as its reward."""


class Reward(Protocol):
    """Gives rewards."""

    def give(self, items: Sequence[tuple[int, Item]], keep: Keep) -> None:
        """Calls `keep` with each index as soon as its reward is there.

        Raises:
            BadRecipe: one cannot be given; `keep` has been called for the others that were there.
        """


@contextlib.contextmanager
def opened(text: str, timeout_s: float, device: str) -> Iterator[Reward]:
    """The reward that a text names; what can be checked without a reply has been.

    Args:
        text: in one of the forms above.
        timeout_s: seconds that one reward may take, of a function or a server.
        device: torch's name of it, for a classifier.

    Raises:
        BadRecipe: there is no such thing, or it cannot be used.
    """
    if text.startswith(("http://", "https://")):
        yield _Endpoint(text, timeout_s)
    elif Path(text).is_dir():
        yield _Classifier(Path(text), device)
    elif text.rpartition(":")[0].endswith(".py"):
        with Called(text, "--reward", "--reward-timeout", timeout_s) as function:
            yield _Function(function)
    else:
        raise BadRecipe(
            "no such reward",
            field="--reward",
            value=text,
            allowed="FILE.py:FUNCTION, a classifier's folder, or http(s)://…",
        )


def rewards(
    reward: Reward | None,
    name: str,
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    file: Path,
) -> list[float]:
    """The rewards of samples, or of those that a killed run has left.

    Args:
        reward: from `opened`; None where all are in the file.
        name: the text that it was opened with.
        prompts: of the samples.
        samples: equally many for each prompt, those of the first prompt first.
        file: JSONL; holds what is finished, a line for each sample.

    Raises:
        BadRecipe: a reward cannot be given or is not finite; or `file` is of another run.
    """
    each = len(samples) // len(prompts)
    items = []
    for i, sample in enumerate(samples):
        prompt = prompts[i // each]
        where = f"{prompt.where}, sample {i % each + 1}"
        items.append(Item(where, prompt.given, sample.text))
    marks = [_digest(name, i, sample) for i, sample in enumerate(samples)]
    with Journal(file) as journal:
        known: dict[Any, Any] = {e.get("sample"): e.get("reward") for e in journal.entries}
        if known.keys() - set(marks):
            raise BadRecipe(
                "holds rewards of other samples, or by another --reward",
                field=str(file),
                allowed="the same as before, or remove the file to start again",
            )
        left = [(i, item) for i, item in enumerate(items) if marks[i] not in known]
        bar = tqdm(total=len(items), initial=len(known), desc="rewards", disable=None)

        def keep(index: int, value: object) -> None:
            known[marks[index]] = _number(value, items[index].where)
            journal.add({"sample": marks[index], "reward": known[marks[index]]})
            bar.update()

        with bar:
            if left:
                assert reward is not None
                reward.give(left, keep)
    return [float(known[mark]) for mark in marks]


def _digest(name: str, index: int, sample: Sample) -> str:
    text = json.dumps([name, index, sample.prompt, sample.reply])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRecipe(
            "the reward is not a finite number", field=where, value=value or repr(value)
        )
    return float(value)


class _Function:
    def __init__(self, function: Called) -> None:
        self._function = function

    def give(self, items: Sequence[tuple[int, Item]], keep: Keep) -> None:
        for index, item in items:
            keep(index, self._function.call(item.where, item.prompt, item.reply))


class _Classifier:
    def __init__(self, folder: Path, device: str) -> None:
        self._model = RewardModel(folder, device)

    def give(self, items: Sequence[tuple[int, Item]], keep: Keep) -> None:
        for index, item in items:
            keep(index, self._model.score(item.prompt, item.reply, item.where))


class _Endpoint:
    def __init__(self, url: str, timeout_s: float) -> None:
        self._peer = Peer(
            url,
            "--reward",
            "a server that answers in time, or a longer --reward-timeout",
            timeout_s=timeout_s,
            patience_s=3 * timeout_s,
            connections=_CONNECTIONS,
        )
        self._peer.check()
        try:
            httpx.get(url, timeout=timeout_s)  # Whatever it answers, it is there.
        except httpx.HTTPError as error:
            raise BadRecipe(f"cannot be reached: {error}", field="--reward", value=url) from error

    def give(self, items: Sequence[tuple[int, Item]], keep: Keep) -> None:
        asyncio.run(self._give(items, keep))

    async def _give(self, items: Sequence[tuple[int, Item]], keep: Keep) -> None:
        left = iter(items)

        async def work(client: httpx.AsyncClient) -> None:
            for index, item in left:
                body = {"prompt": item.prompt, "reply": item.reply}
                answer = await ask(client, self._peer, "POST", self._peer.url, body, item.where)
                keep(index, _reward_of(answer, item.where))

        async with self._peer.client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(_CONNECTIONS):
                        group.create_task(work(client))
            except ExceptionGroup as errors:  # The first has ended the others.
                raise errors.exceptions[0] from None


def _reward_of(answer: Any, where: str) -> object:
    if not isinstance(answer, dict) or "reward" not in answer:
        raise BadRecipe(
            "the answer has no reward",
            field=where,
            value=answer or repr(answer),
            allowed='{"reward": number}',
        )
    return answer["reward"]
