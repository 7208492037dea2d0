"""The baseline loop behind HTTP: `python -m load_tests.sequential_server PORT MODEL WEIGHT …`.

One batch at a time: it takes what has arrived, pads it, and runs it to its longest member; what
arrives meanwhile waits. Tokens are streamed as they are drawn, which the loop's users do not have.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from starlette.applications import Starlette
from transformers import AutoTokenizer

from load_tests.completions_server import application, serve
from load_tests.sequential import SequentialModels

LARGEST_BATCH = 64


@dataclass
class _Waiting:
    prompt: list[int]
    count: int
    drawn: asyncio.Queue[int] = field(default_factory=asyncio.Queue)


class StaticBatches:
    """Feeds the loop.

    Args:
        models: the loop.
        largest: most members of a batch.
    """

    def __init__(self, models: SequentialModels, largest: int = LARGEST_BATCH) -> None:
        self._models, self._largest = models, largest
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()

    async def run(self) -> None:
        """Serves batches, forever."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._largest and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            await asyncio.to_thread(self._serve, batch, asyncio.get_running_loop())

    def _serve(self, batch: list[_Waiting], loop: asyncio.AbstractEventLoop) -> None:
        steps = max(member.count for member in batch)
        for tokens in self._models.decode([member.prompt for member in batch], steps):
            loop.call_soon_threadsafe(_hand_out, batch, tokens)

    async def generate(self, prompt: list[int], count: int) -> AsyncIterator[int]:
        """The tokens of one request."""
        own = _Waiting(prompt, count)
        self._waiting.put_nowait(own)
        for _ in range(count):
            yield await own.drawn.get()


def _hand_out(batch: list[_Waiting], tokens: list[int]) -> None:
    """Members that have all they asked for are computed on, and get nothing."""
    for member, token in zip(batch, tokens, strict=True):
        member.drawn.put_nowait(token)


def main() -> None:
    """Loads the models in bfloat16 and serves them."""
    port, *rest = sys.argv[1:]
    torch.set_num_threads(os.cpu_count() or 1)
    folders = [Path(folder) for folder in rest[::2]]
    models = SequentialModels.load(folders, [float(w) for w in rest[1::2]], torch.bfloat16)
    batches = StaticBatches(models)
    app = application(AutoTokenizer.from_pretrained(folders[0]), batches.generate)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(batches.run())
        yield
        running.cancel()

    app.router.lifespan_context = lifespan
    serve(app, int(port))


if __name__ == "__main__":
    main()
