"""The registry as the configuration says: folders, limits, and a whole life with a real Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.errors import BadSource, RegistryAway
from server.adapting.registry import fetcher_of, registry_of, state_directory
from server.settings.config import Config
from server.settings.file import parse
from tests.adapters.registry.kit import ReadingLoader, make_lora, until


def config(folder: Path, **sections: Any) -> Config:
    return parse({"model": "org/m", **sections}, folder, {})


def test_folders_are_relative_to_the_file_and_have_defaults(tmp_path: Path) -> None:
    plain = config(tmp_path)
    assert state_directory(plain, {"XDG_STATE_HOME": "/s"}) == Path("/s/coxswain/m")
    home = Path.home() / ".local/state/coxswain/m"
    assert state_directory(plain, {}) == state_directory(plain, {"XDG_STATE_HOME": "s"}) == home
    odd = config(tmp_path, served_model_name="a/../b c")
    assert state_directory(odd, {"XDG_STATE_HOME": "/s"}) == Path("/s/coxswain/a_.._b_c")
    found = config(tmp_path, adapters={"roots": ["in", "/abs"], "store": "kept"},
                   registry={"directory": "./state"})  # fmt: skip
    assert state_directory(found) == tmp_path / "state"
    fetcher = fetcher_of(found)
    assert fetcher.store.root == tmp_path / "kept"
    assert fetcher.allowed.roots == (tmp_path / "in", Path("/abs"))


async def test_an_adapter_is_there_again_after_a_restart(tmp_path: Path) -> None:
    make_lora(tmp_path / "in/a", 2.0)
    found = config(tmp_path, adapters={"roots": ["in"]}, registry={"directory": "state"})
    async with registry_of(found, ReadingLoader()) as manager:
        await manager.submit("a", str(tmp_path / "in/a"), version="3")
        await until(lambda: "a" in manager.loaded)
        with pytest.raises(BadSource, match="not under an allowed root"):
            await manager.submit("b", str(tmp_path))
        with pytest.raises(RegistryAway, match="another server"):
            async with registry_of(found, ReadingLoader()):
                pass
    loader = ReadingLoader()
    async with registry_of(found, loader) as manager:
        await until(lambda: "a" in manager.loaded, 3)
        assert manager.lookup("a", "3").folder.parent == tmp_path / "state/adapters"
        assert list(loader.engine.values()) == [2.0]
