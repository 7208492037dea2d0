"""Templates of callers: several processes, a queue for each caller, turns."""

from __future__ import annotations

import asyncio
import time

import pytest

from server.access import ANYONE
from server.errors import HttpError
from server.requests.sandbox import RenderFailed, Sandbox
from server.requests.template_process import RENDER_S

TALK = [{"role": "user", "content": "Hello"}]
SLOW = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


async def render(sandbox: Sandbox, caller: str, template: str = "{{ messages[0].content }}") -> str:
    return await sandbox.render(caller, template, TALK, {})


async def warm(sandbox: Sandbox) -> None:
    """Both processes are there."""
    await asyncio.gather(*(render(sandbox, ANYONE) for _ in range(2)))


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(2)


@pytest.mark.timeout(120)
async def test_slow_templates_of_one_caller_delay_nobody_else(sandbox: Sandbox) -> None:
    await warm(sandbox)
    slow = [asyncio.create_task(render(sandbox, "greedy", SLOW)) for _ in range(6)]
    await asyncio.sleep(0.3)
    for _ in range(5):
        assert await render(sandbox, "other") == "Hello"
    assert not all(task.done() for task in slow)
    # With every process taken, by two who are slow, a third waits for one template and no more.
    slow += [asyncio.create_task(render(sandbox, "slow too", SLOW)) for _ in range(3)]
    await asyncio.sleep(0.3)
    assert await render(sandbox, "third") == "Hello"
    assert sum(task.done() for task in slow) < len(slow) - 2, "in their order it would be the last"
    for task in slow:
        task.cancel()
    for found in await asyncio.gather(*slow, return_exceptions=True):
        assert isinstance(found, (RenderFailed, asyncio.CancelledError))


async def test_a_caller_s_queue_has_an_end_and_nobody_else_s_is_full_by_it() -> None:
    small = Sandbox(2, most_waiting=3)
    await warm(small)
    slow = [asyncio.create_task(render(small, "greedy", SLOW)) for _ in range(4)]
    await asyncio.sleep(0.1)
    with pytest.raises(HttpError, match="wait to be rendered") as caught:
        await render(small, "greedy")
    assert (caught.value.status, caught.value.retry_after_s) == (429, 2)
    assert await render(small, "other") == "Hello"
    slow[3].cancel()
    await asyncio.sleep(0)
    slow.append(asyncio.create_task(render(small, "greedy")))
    await asyncio.sleep(0.1)
    assert not slow[-1].done(), "who leaves makes room in the queue"
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    assert await asyncio.wait_for(render(small, "greedy"), RENDER_S + 5) == "Hello"


@pytest.mark.nightly
async def test_without_keys_all_processes_are_for_all(sandbox: Sandbox) -> None:
    await warm(sandbox)
    slow = [asyncio.create_task(render(sandbox, ANYONE, SLOW)) for _ in range(2)]
    begin = time.perf_counter()
    await asyncio.gather(*slow, return_exceptions=True)
    assert time.perf_counter() - begin < 2 * RENDER_S


async def test_what_a_template_leaves_behind_ends_with_it(sandbox: Sandbox) -> None:
    """After one that is stopped, or takes all memory, the next is rendered."""
    await warm(sandbox)
    for bad, words in ((SLOW, "more than 2 s"), ("{{ 'x' * 10**10 }}", "too much memory"),
                       ("{{ 'x' * (17 * 1024 * 1024) }}", "characters")):  # fmt: skip
        with pytest.raises(RenderFailed, match=words):
            await render(sandbox, "a", bad)
        assert await render(sandbox, "a") == "Hello"
