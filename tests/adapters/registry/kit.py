"""Real adapters on disk, a loader that reads them, and replicas: what the registry tests use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from adapters.errors import DoesNotFit
from adapters.registry.address import parse_address
from adapters.registry.connection import open_store
from adapters.registry.loader import Loader
from adapters.registry.manager import Manager
from adapters.registry.record import Content, Facts, Record
from adapters.registry.redis_store import RedisStore
from adapters.registry.store import NOWHERE
from adapters.registry.store import Store as RecordStore
from adapters.sources.fetch import Fetcher
from adapters.sources.source import Allowed
from adapters.sources.store import ContentStore

MODULE = "model.layers.0.self_attn.q_proj"


def make_lora(folder: Path, value: float = 1.0, size: int = 16) -> Path:
    """A PEFT adapter of rank 4 on one layer; `value` fills its A."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
              "base_model_name_or_path": "tiny"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.{MODULE}.lora_"
    tensors = {f"{prefix}A.weight": np.full((4, size), value, np.float32),
               f"{prefix}B.weight": np.ones((size, 4), np.float32)}  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class ReadingLoader:
    """A `Loader` whose engine is a dictionary: it reads every tensor, as an engine would.

    It fails the test if the manager breaks the protocol: a content loaded twice, a folder that
    is not there, calls for one name that overlap.
    """

    def __init__(self, pause_s: float = 0.0) -> None:
        self.engine: dict[tuple[str, str | None, str], float] = {}
        self.pause_s = pause_s
        self.loads = 0
        self.unloads = 0
        self.asked: list[tuple[str, bool]] = []
        """Names, and whether the engine had to have them at once."""
        self.broken: Exception | None = None
        self.held: dict[str | None, asyncio.Event] = {}
        """Digests whose requests take until the event is set."""
        self._busy: set[str] = set()
        self._stays: set[tuple[str, str | None, str]] = set()

    async def load(self, content: Content, folder: Path, *, now: bool = True) -> Facts:
        self.asked.append((content.name, now))
        key = (content.name, content.digest, content.stream)
        assert key not in self.engine or key not in self._stays, f"{key} is loaded already"
        assert content.name not in self._busy, f"{content.name}: overlapping calls"
        self._busy.add(content.name)
        self._stays.add(key)
        try:
            await asyncio.sleep(self.pause_s)
            if self.broken is not None:
                raise self.broken
            tensors = load_file(folder / "adapter_model.safetensors")
            a = tensors[f"base_model.model.{MODULE}.lora_A.weight"]
            if a.shape[1] != 16:
                raise DoesNotFit("its shape does not fit the base", field="lora_A", value=a.shape)
            self.engine[key] = float(a[0, 0])
            self.loads += 1
            return Facts("lora", "tiny", sum(t.nbytes for t in tensors.values()))
        except BaseException:
            self._stays.discard(key)
            raise
        finally:
            self._busy.remove(content.name)

    async def unload(self, content: Content) -> None:
        key = (content.name, content.digest, content.stream)
        self._stays.discard(key)
        await asyncio.sleep(self.pause_s)
        if content.digest in self.held:
            await self.held[content.digest].wait()
        if key not in self._stays and self.engine.pop(key, None) is not None:
            self.unloads += 1


class Replica:
    """One server as the registry sees it: a manager, its loader and its store."""

    def __init__(
        self, records: RecordStore, root: Path, store: Path, *, remotes: tuple[str, ...] = (),
        pause_s: float = 0.0, every_s: float = 0.3, alive_s: float = 2.0,
        broken: Exception | None = None,
    ) -> None:  # fmt: skip
        self.loader = ReadingLoader(pause_s)
        self.loader.broken = broken
        loader: Loader = self.loader
        self.fetcher = Fetcher(ContentStore(store), Allowed((root,), remotes))
        self.manager = Manager(records, self.fetcher, loader, every_s=every_s, alive_s=alive_s)
        self.records = records

    def answers(self, name: str) -> float | None:
        """What a request for this adapter would get here; None: it is not found."""
        loaded = self.manager.loaded.get(name)
        if loaded is None:
            return None
        content = loaded.content
        return self.loader.engine[content.name, content.digest, content.stream]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        """With the manager's life around it."""
        task = asyncio.create_task(self.manager.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def replica(
    url: str, namespace: str, root: Path, store: Path, **settings: Any
) -> AsyncIterator[Replica]:
    """A running replica with a connection of its own."""
    async with (
        open_store(parse_address(url), namespace=namespace) as records,
        Replica(records, root, store, **settings).running() as found,
    ):
        yield found


@asynccontextmanager
async def opened(url: str, namespace: str) -> AsyncIterator[RedisStore]:
    """A store in Redis."""
    async with open_store(parse_address(url), namespace=namespace) as found:
        assert isinstance(found, RedisStore)
        yield found


async def all_records(store: RecordStore) -> dict[str, Record]:
    """Everything in a store."""
    found = await store.look(NOWHERE)
    return {name: record for name, record in found.records.items() if record is not None}


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until the condition holds; fails the test after so many seconds."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not true after {seconds} s")
