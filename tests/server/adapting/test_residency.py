"""What the engine holds: eviction, pins, waiting, and what goes wrong in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from adapters.errors import BadAdapter, DoesNotFit, NoRoom
from adapters.sets import AdapterSet, Member
from server.adapting.leases import Leases
from server.adapting.residency import Residency


def lora(name: str) -> AdapterSet:
    """A set of one adapter whose digest is `name`."""
    return AdapterSet.of([Member("base", name, "/nowhere", (4,), False)])


class Engine:
    """Slots that never take more than they have; loading waits for `gate`."""

    def __init__(self, slots: int) -> None:
        self.slots, self.held, self.log = slots, set[str](), list[str]()
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken = ""

    async def load_set(self, found: AdapterSet) -> None:
        await self.gate.wait()
        digest = found.members[0].digest
        if digest == self.broken:
            raise BadAdapter("broken")
        assert digest not in self.held and len(self.held) < self.slots
        self.held.add(digest)
        self.log.append(f"+{digest}")

    async def unload_set(self, found: AdapterSet) -> None:
        await asyncio.sleep(0)
        digest = found.members[0].digest
        self.held.discard(digest)
        self.log.append(f"-{digest}")


class Case:
    """A residency over such an engine."""

    def __init__(self, slots: int = 2, max_bytes: int = 100) -> None:
        self.engine = Engine(slots)
        self.sizes: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.residency = Residency(
            self.engine,
            slots=slots,
            max_bytes=max_bytes,
            bytes_of=lambda s: self.sizes.get(s.members[0].digest, 1),
            pinned=lambda s: s.members[0].digest in self.pinned,
        )

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[None]:
        async with self.residency.holding(lora(name)):
            assert name in self.engine.held
            yield

    async def use(self, *names: str) -> None:
        for name in names:
            async with self.using(name):
                await asyncio.sleep(0)


async def settle() -> None:
    """Lets every task run until it waits for another."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_least_recently_used_makes_room() -> None:
    case = Case()
    await case.use("a", "b", "a", "c")
    assert case.engine.log == ["+a", "+b", "-b", "+c"]
    assert [s.members[0].digest for s in case.residency.held] == ["a", "c"]
    assert (case.residency.loads, case.residency.evictions) == (3, 1)


async def test_bytes_are_a_budget_too() -> None:
    case = Case(slots=8, max_bytes=10)
    case.sizes = {"a": 4, "b": 4, "c": 7, "d": 11}
    await case.use("a", "b", "c")
    assert case.engine.held == {"c"} and case.residency.bytes == 7
    with pytest.raises(DoesNotFit, match=r"max_loaded_bytes \(got 11\); allowed: ≤ 10"):
        await case.use("d")
    assert case.engine.held == {"c"}, "what can never fit evicts nothing"


async def test_pinned_ones_stay() -> None:
    case = Case()
    case.pinned = {"a"}
    await case.use("a", "b", "c", "d")
    assert "a" in case.engine.held and "-a" not in case.engine.log
    case.pinned = {"a", "d"}
    with pytest.raises(NoRoom, match="pinned"):
        await case.use("e")
    case.pinned = set()
    await case.use("e")
    assert "e" in case.engine.held


async def test_requests_wait_for_a_place_in_their_order() -> None:
    case = Case(slots=1)
    order: list[str] = []

    async def one(name: str) -> None:
        async with case.using(name):
            order.append(name)
            await asyncio.sleep(0.001)

    async with asyncio.timeout(5):
        await asyncio.gather(*(one(name) for name in "abcdeabcde"))
    assert order == list("abcdeabcde")


async def test_constant_traffic_on_what_is_held_keeps_nobody_out() -> None:
    case = Case(slots=1)
    stop = asyncio.Event()

    async def busy(delay: float) -> None:
        await asyncio.sleep(delay)
        while not stop.is_set():
            async with case.using("a"):
                await asyncio.sleep(0.01)

    # Two that overlap: the slot of `a` is never idle by itself.
    traffic = [asyncio.create_task(busy(d)) for d in (0, 0.005)]
    await asyncio.sleep(0.02)
    async with asyncio.timeout(5):
        await case.use("b")
    stop.set()
    await asyncio.gather(*traffic)


async def test_many_users_load_a_set_once() -> None:
    case = Case()
    case.engine.gate.clear()
    users = [asyncio.create_task(case.use("a")) for _ in range(5)]
    await settle()
    case.engine.gate.set()
    await asyncio.gather(*users)
    assert case.engine.log == ["+a"]


async def test_who_leaves_while_it_loads_or_waits_leaves_nothing() -> None:
    case = Case(slots=1)
    case.engine.gate.clear()
    first = asyncio.create_task(case.use("a"))
    waiting = asyncio.create_task(case.use("b"))
    await settle()
    for task in (waiting, first):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    case.engine.gate.set()
    await settle()
    assert case.engine.held == {"a"}, "its loading could not be stopped, and it is there for others"
    await case.use("b", "c")
    assert case.engine.held == {"c"}


async def test_what_cannot_be_loaded_takes_no_place() -> None:
    case = Case(slots=1)
    case.engine.broken = "x"
    results = await asyncio.gather(case.use("x"), case.use("x"), return_exceptions=True)
    assert all(isinstance(r, BadAdapter) for r in results)
    assert not case.residency.held and not case.residency.bytes
    case.engine.broken = ""
    await case.use("x")


async def test_removing_waits_for_the_users() -> None:
    case = Case()
    async with case.using("a"):
        removing = asyncio.create_task(case.residency.remove("a"))
        await settle()
        assert case.engine.held == {"a"} and not removing.done()
    await removing
    assert not case.engine.held
    await case.residency.remove("never seen")


async def test_removed_while_it_loads_and_asked_for_again() -> None:
    case = Case(slots=1)
    case.engine.gate.clear()
    gone = asyncio.create_task(case.use("a"))
    await settle()
    gone.cancel()
    await settle()
    removing = asyncio.create_task(case.residency.remove("a"))
    await settle()
    again = asyncio.create_task(case.use("a"))
    await settle()
    case.engine.gate.set()
    await asyncio.gather(removing, again)
    assert case.engine.log == ["+a", "-a", "+a"]


async def test_a_lease_keeps_a_content() -> None:
    leases = Leases()
    with leases.lease(["a", "b"]):
        with leases.lease(["a", "a"]):
            free = asyncio.create_task(leases.free("a"))
            await settle()
            assert not free.done()
        await settle()
        assert not free.done()
        await leases.free("c")
    await free
    await leases.free("b")


@pytest.fixture
def one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every set the same id."""
    monkeypatch.setattr("adapters.sets.IDS", range(1 << 20, (1 << 20) + 1))
    assert lora("a").set_id == lora("b").set_id and lora("a").name != lora("b").name


@pytest.mark.usefixtures("one_id")
async def test_sets_of_one_id_are_never_held_together() -> None:
    case = Case(slots=4)
    await case.use("a", "b", "a")
    await settle()
    assert case.engine.log == ["+a", "-a", "+b", "-b", "+a"]
    assert [found.members[0].digest for found in case.residency.held] == ["a"]


@pytest.mark.usefixtures("one_id")
async def test_a_set_waits_until_the_one_with_its_id_is_done() -> None:
    case, done = Case(slots=4), asyncio.Event()

    async def hold() -> None:
        async with case.using("a"):
            await done.wait()

    first, second = asyncio.create_task(hold()), asyncio.create_task(case.use("b"))
    await settle()
    assert case.engine.held == {"a"} and not second.done()
    done.set()
    await asyncio.gather(first, second)
    assert case.engine.log == ["+a", "-a", "+b"]


@pytest.mark.usefixtures("one_id")
async def test_a_set_with_the_id_of_a_pinned_one_is_refused_before_a_response_begins() -> None:
    case = Case(slots=4)
    await case.use("a")
    case.pinned.add("a")
    with pytest.raises(NoRoom, match="adapters: the engine gives these adapters the id of others"):
        case.residency.check_room(lora("b"))
    with pytest.raises(NoRoom, match="id of others that are pinned"):
        await case.use("b")
    case.residency.check_room(lora("a"))
    assert case.engine.log == ["+a"]
