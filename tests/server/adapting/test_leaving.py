"""Clients that leave, and loads beside a running stream: nothing is left behind, nothing stalls."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.adapting.expected import CONTENTS, Kind, Oracle
from tests.server.adapting.kit import PATIENCE_S, exact, listing, load, submit, unload
from tests.server.live import Server
from tests.server.watch import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ONE = {name: Kind(((name, 1.0, None, None),)) for name in ("a", *CONTENTS)}
LONG: dict[str, Any] = {"max_tokens": 150, "logprobs": None}


async def leave_after(server: Server, body: dict[str, Any], seconds: float) -> bool:
    """Asks and hangs up; whether the answer was there before."""
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        try:
            async with asyncio.timeout(seconds):
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return True
        except TimeoutError:
            return False


async def test_clients_that_leave_while_they_wait_leave_nothing_behind(
    live: Server, folders: dict[str, Path], oracle: Oracle
) -> None:
    """They leave while they wait for a slot, while their set loads, and in mid-answer."""
    for name in CONTENTS:
        load(live, name, folders[name])
    kinds = [
        Kind(((first, 1.0, None, None), (second, 0.5, None, None)))
        for first in CONTENTS
        for second in CONTENTS
        if first < second
    ]
    bodies = [kind.body({}) for kind in (*kinds, *ONE.values())]
    # Long answers keep the slots taken, so that most have to wait.
    left = await asyncio.gather(
        *(leave_after(live, {**body, **LONG, "stream": stream}, 0.03 * i)
          for i, body in enumerate(bodies * 3) for stream in (False, True))
    )  # fmt: skip
    assert not all(left)
    exact(live, ONE["v2"].body({}), oracle(ONE["v2"]))
    # Nothing is used any more: everything can be unloaded, and then nothing is held.
    for name in CONTENTS:
        unload(live, name)
    until(lambda: listing(live)["engine"]["taken"] <= 4 and
          live.get("/ready").json()["in_flight"] == 0, 60)  # fmt: skip
    assert not {r["name"] for r in listing(live)["adapters"]} & set(CONTENTS)
    exact(live, ONE["a"].body({}), oracle(ONE["a"]))


async def test_an_unload_waits_for_the_stream_that_runs_and_a_replacement_does_not(
    live: Server, folders: dict[str, Path], oracle: Oracle
) -> None:
    """The stream goes on with what it began with; new requests get what is new, at once."""
    load(live, "x", folders["v0"])
    body = {**ONE["v0"].body({"v0": "x"}, as_model=True), **LONG, "stream": True}
    async with (
        httpx.AsyncClient(base_url=live.url, timeout=PATIENCE_S) as client,
        client.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.aiter_lines()
        await anext(lines)
        await asyncio.to_thread(load, live, "x", folders["v1"], replace=True)
        new = ONE["v1"].body({"v1": "x"}, as_model=True)
        await asyncio.to_thread(exact, live, new, oracle(ONE["v1"]))
        assert live.post("/v1/unload_lora_adapter", {"lora_name": "x"}).status_code == 200
        gone = await client.post("/v1/completions", json=new)
        assert gone.status_code == 404
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]" and not any('"error"' in line for line in rest)
    until(lambda: live.get("/admin/adapters/x").status_code == 404, PATIENCE_S)


@pytest.mark.nightly
async def test_a_running_stream_goes_on_while_adapters_are_loaded(
    live: Server, folders: dict[str, Path]
) -> None:
    """The longest pause between its tokens is measured with and without loads beside it."""
    loading = asyncio.Event()

    async def pauses() -> list[float]:
        body = {**Kind().body({}), **LONG, "stream": True}
        found: list[float] = []
        count = 0
        async with (
            httpx.AsyncClient(base_url=live.url, timeout=PATIENCE_S) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            last = 0.0
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    count += sum(len(choice["token_ids"]) for choice in choices)
                    now = time.monotonic()
                    if last:
                        found.append(now - last)
                    last = now
                    loading.set()
        assert count == LONG["max_tokens"]
        return found

    alone = await pauses()
    beside: list[float] = []
    names = [f"beside{i}" for i in range(8)]
    loaded_s = 0.0
    async with asyncio.TaskGroup() as group:
        loading.clear()
        running = group.create_task(pauses())
        await loading.wait()
        begun = time.monotonic()
        for name, content in zip(names, CONTENTS * 2, strict=True):
            assert (await asyncio.to_thread(submit, live, name, folders[content])).is_success
        while not loaded_s:
            if running.done():  # one stream after the other, until all are loaded
                beside += running.result()
                running = group.create_task(pauses())
            records = (await asyncio.to_thread(listing, live))["adapters"]
            if sum(r["state"] == "ready" for r in records if r["name"] in names) == len(names):
                loaded_s = time.monotonic() - begun
            await asyncio.sleep(0.02)
    beside += running.result()
    print(f"\nlongest pause of a stream: {max(alone):.3f} s alone, {max(beside):.3f} s while 8 "
          f"adapters were loaded in {loaded_s:.2f} s; mean {sum(alone) / len(alone):.4f} and "
          f"{sum(beside) / len(beside):.4f} s")  # fmt: skip
    assert max(beside) < 2.0
    for name in names:
        unload(live, name)
