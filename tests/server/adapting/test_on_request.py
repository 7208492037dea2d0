"""Where an adapter that a request names is looked for, and how long the request waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.errors import BadSource, SourceAway
from adapters.registry.manager import Manager
from adapters.sources.fetch import Fetcher
from adapters.sources.source import Allowed, Source
from adapters.sources.store import ContentStore
from server.adapting import on_request
from server.adapting.on_request import LoadOnRequest
from server.settings.config import AdaptersConfig


class Registry:
    """What `LoadOnRequest` needs of a manager; nothing that is submitted becomes ready."""

    def __init__(self, present: Callable[[Source], bool]) -> None:
        self.records: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}
        self.looked: list[str] = []
        self.submitted: list[tuple[str, str]] = []
        self.fetcher = self
        self._present = present

    def present(self, source: Source) -> bool:
        self.looked.append(str(source))
        return self._present(source)

    def failure(self, name: str) -> None:
        return None

    async def submit(self, name: str, source: str, **more: Any) -> None:
        self.submitted.append((name, source))
        self.records[name] = SimpleNamespace(state="pending", reason=None, error=None, **more,
                                             loaded_by=more["by"])  # fmt: skip


def loading(registry: Registry, *sources: str, wait_s: float = 0.2) -> LoadOnRequest:
    section = AdaptersConfig(load_on_request=True, request_sources=sources, request_wait_s=wait_s)
    return LoadOnRequest(cast(Manager, registry), section)


async def test_a_request_waits_so_long_and_the_one_load_goes_on() -> None:
    registry = Registry(lambda source: True)
    found = loading(registry, "/adapters")
    waits = await asyncio.gather(*(found.load("x", "model") for _ in range(5)),
                                 return_exceptions=True)  # fmt: skip
    assert all(isinstance(one, SourceAway) and "request_wait_s" in str(one) for one in waits)
    assert registry.submitted == [("x", "/adapters/x")]
    registry.loaded["x"] = True
    await found.load("x", "model")


async def test_places_are_tried_in_order_and_hubs_by_owner() -> None:
    registry = Registry(lambda source: False)
    found = loading(registry, "/adapters", "hf://acme", "hf://", "s3://models/loras")
    await found.load("acme/x", "model")
    assert registry.looked == [
        "/adapters/acme/x", "hf://acme/x", "hf://acme/x", "s3://models/loras/acme/x",
    ]  # fmt: skip
    registry.looked.clear()
    await found.load("acme/x", "model")  # remembered as found nowhere
    for name in ("../x", "/x", "x/y/z", "", "x@y"):
        await found.load(name, "model")
    assert registry.looked == [] and registry.submitted == []


async def test_a_place_that_is_away_is_told_unless_another_has_it() -> None:
    def present(source: Source) -> bool:
        if source.kind == "hub":
            raise SourceAway("no answer")
        return source.kind == "s3" and source.folder.endswith("there")

    registry = Registry(present)
    found = loading(registry, "hf://acme", "s3://models/loras")
    with pytest.raises(SourceAway, match="model: no answer"):
        await found.load("missing", "model")
    with pytest.raises(SourceAway, match="request_wait_s"):
        await found.load("there", "model")
    assert registry.submitted == [("there", "s3://models/loras/there")]


async def test_requests_cannot_register_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_request, "MOST", 2)
    registry = Registry(lambda source: True)
    found = loading(registry, "/adapters", wait_s=0.02)
    for name in "ab":
        with pytest.raises(SourceAway):
            await found.load(name, "model")
    with pytest.raises(Exception, match="requests have registered 2 adapters"):
        await found.load("c", "model")


def test_a_folder_is_an_adapter_only_with_its_config_and_inside_the_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "good", root / "empty", outside):
        folder.mkdir(parents=True)
    for folder in (root / "good", outside):
        (folder / "adapter_config.json").write_text("{}")
    (root / "link").symlink_to(outside)
    fetcher = Fetcher(ContentStore(tmp_path / "store"), Allowed((root,)))

    def present(folder: Path) -> bool:
        return fetcher.present(Source("local", str(folder), str(folder)))

    assert present(root / "good")
    assert not present(root / "empty") and not present(root / "none")
    for folder in (outside, root / "link"):
        with pytest.raises(BadSource, match="not under an allowed root"):
            present(folder)
