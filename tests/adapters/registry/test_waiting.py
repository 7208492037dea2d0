"""Nothing waits for a long request, nor for a source that is silent."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from adapters.errors import Conflict
from tests.adapters.registry.kit import make_lora, replica, until
from tests.adapters.sources.servers import Server, folder, held_back


async def test_long_requests_on_old_contents_hold_up_no_load(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """Not of other names, not the next one of the same name, not the way back."""
    one, two, three = (make_lora(tmp_path / f"in/{i}", float(i)) for i in (1, 2, 3))
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        names = ("a", "b", "c")  # more than are loaded at the same time
        for name in names:
            await r.manager.submit(name, str(one))
        await until(lambda: all(r.answers(name) == 1.0 for name in names))
        digest = r.manager.lookup("a").content.digest
        done = r.loader.held[digest] = asyncio.Event()
        for name in names:
            await r.manager.submit(name, str(two), replace=True)
        await until(lambda: all(r.answers(name) == 2.0 for name in names))
        await r.manager.submit("a", str(three), replace=True)
        await until(lambda: r.answers("a") == 3.0)
        await r.manager.submit("b", str(one), replace=True)
        await until(lambda: r.answers("b") == 1.0)
        assert digest in r.manager.digests()
        await r.manager.remove("c")
        await asyncio.sleep(1.0)
        # Its record goes when its memory is given back.
        assert r.manager.records["c"].state == "unloading"
        done.set()
        await until(lambda: "c" not in r.manager.records)
        await until(lambda: len(r.loader.engine) == 2)
        assert (r.answers("a"), r.answers("b")) == (3.0, 1.0)


async def test_a_silent_source_holds_up_neither_the_unload_nor_other_loads_nor_the_end(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    answers = folder(make_lora(tmp_path / "late", 2.0), "/late")
    good = make_lora(tmp_path / "in/good", 1.0)
    free = held_back(answers, "/late/adapter_model.safetensors")
    with Server(answers).running() as web:
        try:
            async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store",
                               remotes=(web.url,)) as r:  # fmt: skip
                names = ("x", "y")  # all that are fetched at the same time
                for name in names:
                    await r.manager.submit(name, f"{web.url}/late")
                await until(lambda: all(r.manager.records[n].state == "downloading" for n in names))
                await r.manager.remove("x")
                await until(lambda: "x" not in r.manager.records, 5)
                await r.manager.submit("good", str(good))
                await until(lambda: r.answers("good") == 1.0, 5)
                begun = time.monotonic()
            assert time.monotonic() - begun < 5
        finally:
            free.set()


async def test_no_more_are_loaded_pinned_than_may_be_however_many_ask(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    source = make_lora(tmp_path / "in/a", 1.0)
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        asked = [r.manager.submit(f"a{i}", str(source), pin=True, most_pins=3) for i in range(8)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Conflict)]
        assert len(refused) == 5 and "3 adapters are pinned" in str(refused[0])
        assert sum(record.pinned for record in r.manager.records.values()) == 3
