"""The way into the engine: the same bytes under several names, while some come and others go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapters.errors import BadAdapter
from adapters.formats.base import base_shapes
from adapters.registry.record import Content
from adapters.sets import AdapterSet
from adapters.sources.store import digest_of
from server.adapting.loader import EngineLoader
from server.checks.adapters import Target
from tests.adapters.make import make_lora


@dataclass
class Engine:
    """Slots whose loading and unloading take a moment."""

    held: set[str] = field(default_factory=set)
    broken: bool = False

    async def load_set(self, found: AdapterSet) -> None:
        await asyncio.sleep(0.01)
        if self.broken:
            raise BadAdapter("broken")
        self.held.add(found.name)

    async def unload_set(self, found: AdapterSet) -> None:
        await asyncio.sleep(0.05)
        self.held.remove(found.name)


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    """One adapter."""
    return make_lora(models / "adapters-of-loader", models / "base", seed=3)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def loader(models: Path, engine: Engine) -> EngineLoader:
    """Two slots."""
    targets = {"base": Target("base", base_shapes(models / "base"))}
    return EngineLoader(engine, targets, slots=2, max_rank=16, max_bytes=1 << 30, element_bytes=4)


def content(name: str, folder: Path) -> Content:
    return Content(name, "1", str(folder), digest=digest_of(folder))


def evict(loader: EngineLoader) -> None:
    """As others do that need the slot."""
    for slot in list(loader.residency._taken.values()):
        loader.residency._evict(slot)


async def usable(loader: EngineLoader, content: Content) -> None:
    """What requests do with it: look it up, and bring it in; also after it was evicted."""
    for _ in range(2):
        assert loader.artefact(content).modules
        await loader.admit(content)
        assert loader.resident(content)
        evict(loader)


async def test_a_start_fills_the_room_to_spare_and_no_more(
    loader: EngineLoader, engine: Engine, models: Path
) -> None:
    """Five adapters and two places: the others come when they are asked for."""
    made = [make_lora(models / f"started-{i}", models / "base", seed=50 + i) for i in range(5)]
    contents = [content(f"s{i}", folder) for i, folder in enumerate(made)]
    for one, folder in zip(contents, made, strict=True):
        facts = await loader.load(one, folder, now=False)
        assert facts.kind == "lora" and loader.artefact(one).modules
    assert loader.residency.loads == 2 and loader.residency.evictions == 0
    assert [loader.resident(one) for one in contents] == [True, True, False, False, False]
    await loader.admit(contents[4])
    assert loader.resident(contents[4]) and len(engine.held) <= 3


async def test_the_last_name_of_some_bytes_gives_the_memory_back(
    loader: EngineLoader, engine: Engine, folder: Path
) -> None:
    a, b = content("a", folder), content("b", folder)
    await loader.load(a, folder)
    await loader.load(b, folder)
    await loader.unload(a)
    await usable(loader, b)
    await loader.unload(b)
    assert engine.held == set() and not loader.residency.held
    with pytest.raises(KeyError):
        loader.artefact(b)


@pytest.mark.parametrize("moments", range(0, 90, 5))
async def test_bytes_that_come_under_one_name_while_they_go_under_another_stay(
    loader: EngineLoader, engine: Engine, folder: Path, moments: int
) -> None:
    """Whatever the unload is doing just then."""
    a, b = content("a", folder), content("b", folder)
    await loader.load(a, folder)
    going = asyncio.create_task(loader.unload(a))
    await asyncio.sleep(moments / 1000)
    await loader.load(b, folder)
    await going
    await usable(loader, b)


async def test_bytes_that_are_loaded_again_while_their_unload_waits_for_a_request_stay(
    loader: EngineLoader, engine: Engine, folder: Path
) -> None:
    a = content("a", folder)
    await loader.load(a, folder)
    assert a.digest is not None
    with loader.leases.lease([a.digest]):
        going = asyncio.create_task(loader.unload(a))
        await asyncio.sleep(0.01)
        await asyncio.wait_for(loader.load(a, folder), 5)
        assert not going.done()
    await going
    await usable(loader, a)


async def test_a_load_that_fails_leaves_nothing(
    loader: EngineLoader, engine: Engine, folder: Path
) -> None:
    a = content("a", folder)
    engine.broken = True
    with pytest.raises(BadAdapter, match="broken"):
        await loader.load(a, folder)
    assert not loader.residency.held
    with pytest.raises(KeyError):
        loader.artefact(a)
    engine.broken = False
    await loader.load(a, folder)
    await usable(loader, a)


async def test_what_is_being_brought_in_is_not_unloaded_meanwhile(
    loader: EngineLoader, engine: Engine, folder: Path
) -> None:
    """An administrator pins an adapter that has to wait for a slot, and another unloads it."""
    a = content("a", folder)
    await loader.load(a, folder)
    evict(loader)
    bringing = asyncio.create_task(loader.admit(a))
    await asyncio.sleep(0)
    await loader.unload(a)
    assert bringing.done()
    assert engine.held == set() and not loader.residency.held
