"""The front end's side of a load: several engines, late answers, and whoever gives up meanwhile.

The engines here are queues, as vLLM's are: each does one call after the other, however late the
first is, and whether or not anybody still waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from adapters.errors import AdapterError, BadAdapter, EngineAway, NoRoom, ServerFault, to_wire
from adapters.sets import AdapterSet, Member
from server import engine_vllm
from server.adapting.residency import Residency
from server.engine_vllm import SteeredLLM

TIMEOUT_S = 0.2


def lora(digest: str) -> AdapterSet:
    """A set of one adapter."""
    return AdapterSet.of([Member("base", digest, "/nowhere", (4,), False)])


class One:
    """An engine with one worker: what it holds, and what goes wrong with its next loads."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.most = 0
        self.wrong: Callable[[], Any] | None = None
        self.slow_s = 0.0
        self.queue: asyncio.Queue[tuple[asyncio.Future[Any], str, tuple[Any, ...]]] = (
            asyncio.Queue()
        )
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            future, name, args = await self.queue.get()
            try:
                done = await self._call(name, *args)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result([done])
            self.queue.task_done()

    async def _call(self, name: str, path: str, *_: Any) -> dict[str, Any]:
        found = AdapterSet.from_path(path).members[0].digest
        if name == "coxswain_read_ahead":
            return {"done": True}
        if name == "coxswain_unload":
            self.held.discard(found)
            return {"done": None}
        assert name == "coxswain_load"
        await asyncio.sleep(self.slow_s)
        if self.wrong is not None:
            try:
                self.wrong()
            except AdapterError as error:
                return {"error": to_wire(error)}
        self.held.add(found)
        self.most = max(self.most, len(self.held))
        return {"done": None}


class Core:
    """vLLM's client of several engines."""

    def __init__(self, count: int) -> None:
        self.engines = [One() for _ in range(count)]

    async def call_utility_all_async(
        self, method: str, name: str, within_s: None, args: tuple[Any, ...], kwargs: None
    ) -> list[Any]:
        """As vLLM's: every engine's answer, or the first error."""
        assert method == "collective_rpc"
        futures = []
        for engine in self.engines:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            engine.queue.put_nowait((future, name, args))
            futures.append(future)
        return await asyncio.gather(*futures)

    def shutdown(self, **_: Any) -> None:
        """What vLLM's client does when it is collected."""


@pytest.fixture
async def core(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Core]:
    """Three engines."""
    monkeypatch.setattr(engine_vllm, "RPC_TIMEOUT_S", TIMEOUT_S)
    found = Core(3)
    yield found
    for engine in found.engines:
        engine.task.cancel()


@pytest.fixture
def llm(core: Core) -> SteeredLLM:
    found: SteeredLLM = SteeredLLM.__new__(SteeredLLM)
    found.engine_core = core
    return found


def raising(error: Exception) -> Callable[[], None]:
    def wrong() -> None:
        raise error

    return wrong


async def idle(core: Core) -> None:
    """Lets every engine come to the end of its queue."""
    for engine in core.engines:
        await engine.queue.join()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadAdapter("broken"), BadAdapter),
        (NoRoom("no memory"), NoRoom),
        (Exception("Call to collective_rpc method failed: something"), ServerFault),
        (EngineDeadError(), EngineAway),
    ],
)
async def test_what_one_of_several_engines_cannot_load_none_has(
    llm: SteeredLLM, core: Core, error: Exception, kind: type[AdapterError]
) -> None:
    core.engines[1].wrong = raising(error)
    with pytest.raises(kind) as caught:
        await llm.load_set(lora("a"))
    assert type(caught.value) is kind
    await idle(core)
    assert [engine.held for engine in core.engines] == [set(), set(), set()]
    core.engines[1].wrong = None
    await llm.load_set(lora("a"))
    assert [engine.held for engine in core.engines] == [{"a"}, {"a"}, {"a"}]


async def test_a_load_that_comes_too_late_leaves_nothing(llm: SteeredLLM, core: Core) -> None:
    core.engines[2].slow_s = 2.5 * TIMEOUT_S
    with pytest.raises(EngineAway, match="did not answer within"):
        await llm.load_set(lora("a"))
    await idle(core)
    assert [engine.held for engine in core.engines] == [set(), set(), set()]


async def test_after_a_late_load_the_engine_never_holds_more_than_the_front_end_knows(
    llm: SteeredLLM, core: Core
) -> None:
    """Else it would evict a set that requests run on."""
    for engine in core.engines:
        engine.slow_s = 1.5 * TIMEOUT_S
    residency = Residency(llm, slots=1, max_bytes=100, bytes_of=lambda _: 1, pinned=lambda _: False)
    with pytest.raises(EngineAway):
        await residency.admit(lora("a"))
    for engine in core.engines:
        engine.slow_s = 0.0
    for _ in range(20):  # the queue is still long for a moment
        try:
            await residency.admit(lora("b"))
            break
        except EngineAway:
            continue
    await idle(core)
    assert [engine.held for engine in core.engines] == [{"b"}] * 3
    assert [engine.most for engine in core.engines] == [1, 1, 1]
    assert residency.held == [lora("b")]


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.1, 0.15])
async def test_whoever_is_cancelled_while_it_loads_leaves_nothing(
    llm: SteeredLLM, core: Core, moment: float
) -> None:
    core.engines[0].slow_s = 0.12
    loading = asyncio.create_task(llm.load_set(lora("a")))
    await asyncio.sleep(moment)
    done = loading.done()
    loading.cancel()
    await asyncio.wait([loading])
    await idle(core)
    assert [engine.held for engine in core.engines] == ([{"a"}] * 3 if done else [set()] * 3)
