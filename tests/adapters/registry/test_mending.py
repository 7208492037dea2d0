"""Stored files that somebody changed while their adapter answers."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from adapters.errors import FilesLost
from adapters.registry import mending
from tests.adapters.registry.kit import make_lora, replica, until

WEIGHTS = "adapter_model.safetensors"


def spoil(folder: Path, how: str) -> None:
    """Alters, shortens or deletes what is stored."""
    folder.chmod(0o755)
    (folder / WEIGHTS).chmod(0o644)
    raw = (folder / WEIGHTS).read_bytes()
    match how:
        case "altered":
            (folder / WEIGHTS).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        case "cut short":
            (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])
        case "deleted":
            shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["altered", "cut short", "deleted"])
async def test_what_was_spoiled_comes_back_from_the_source(
    redis_url: str, namespace: str, tmp_path: Path, how: str
) -> None:
    source = make_lora(tmp_path / "in/a", 1.0)
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        for name in ("a", "b"):
            await r.manager.submit(name, str(source))
            await until(lambda n=name: r.answers(n) == 1.0)  # type: ignore[misc]
        loaded = r.manager.lookup("a")
        digest = loaded.folder.name
        await r.manager.mend(digest)
        spoil(loaded.folder, how)
        # Many at once, as requests do that wait for it.
        await asyncio.gather(*(r.manager.mend(digest) for _ in range(8)))
        assert r.fetcher.store.verify(digest) == loaded.folder
        assert r.manager.failure("a") is None


async def test_where_the_source_has_changed_too_it_is_lost_until_that_is_put_right(
    redis_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mending, "AGAIN_S", 0.2)
    source = make_lora(tmp_path / "in/a", 1.0)
    async with replica(redis_url, namespace, tmp_path / "in", tmp_path / "store") as r:
        await r.manager.submit("a", str(source))
        await until(lambda: r.answers("a") == 1.0)
        folder = r.manager.lookup("a").folder
        make_lora(source, 2.0)
        spoil(folder, "altered")
        for _ in range(2):
            with pytest.raises(FilesLost, match="has other content now"):
                await r.manager.mend(folder.name)
        assert "has other content now" in str(r.manager.failure("a"))
        assert r.answers("a") == 1.0, "what the engine holds goes on"
        make_lora(source, 1.0)
        await asyncio.sleep(0.3)
        await r.manager.mend(folder.name)
        assert r.manager.failure("a") is None
        shutil.rmtree(source)
        spoil(folder, "deleted")
        with pytest.raises(FilesLost, match="no such folder"):
            await r.manager.mend(folder.name)
