"""The adapter registry of a server, opened as its configuration says. No routes, no engine."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from adapters.registry.address import Address
from adapters.registry.connection import open_store
from adapters.registry.loader import Loader
from adapters.registry.manager import Manager
from adapters.sources.fetch import Fetcher
from adapters.sources.origin import Limits
from adapters.sources.source import Allowed
from adapters.sources.store import ContentStore
from server.settings.config import AdaptersConfig, Config, RegistryConfig


def state_directory(config: Config, environ: Mapping[str, str] | None = None) -> Path:
    """Where the registry's files lie if the configuration does not say it."""
    registry = config.registry or RegistryConfig()
    if registry.directory is not None:
        return Path(registry.directory)
    state_home = (os.environ if environ is None else environ).get("XDG_STATE_HOME", "")
    # The specification: relative paths are invalid and to be ignored.
    home = Path(state_home) if state_home.startswith("/") else Path.home() / ".local" / "state"
    return home / "coxswain" / re.sub(r"[^A-Za-z0-9_.-]", "_", config.name)


def fetcher_of(config: Config) -> Fetcher:
    """Gets adapters from where the configuration allows it; makes the store's folder."""
    section = config.adapters or AdaptersConfig()
    store = Path(section.store) if section.store else state_directory(config) / "adapters"
    allowed = Allowed(tuple(map(Path, section.roots)), section.remotes)
    limits = Limits(max_bytes=section.max_bytes, max_file_bytes=section.max_bytes,
                    timeout_s=section.fetch_timeout_s)  # fmt: skip
    return Fetcher(ContentStore(store), allowed, limits, s3_endpoint=section.s3_endpoint)


def place_of(config: Config) -> Address | Path:
    """Where the registry's records are."""
    address = config.registry.address if config.registry else None
    return address or state_directory(config) / "registry"


@asynccontextmanager
async def registry_of(config: Config, loader: Loader) -> AsyncIterator[Manager]:
    """A running manager; ends it on leaving.

    Args:
        config: sections `adapters` and `registry`.
        loader: the engine.

    Raises:
        RegistryAway: Redis does not answer, or another server uses the directory.
    """
    section = config.registry or RegistryConfig()
    fetcher = await asyncio.to_thread(fetcher_of, config)
    async with open_store(place_of(config), namespace=section.namespace) as store:
        manager = Manager(store, fetcher, loader)
        running = asyncio.create_task(manager.run(), name="adapter registry")
        try:
            yield manager
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
