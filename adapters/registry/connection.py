"""The registry's store: the operator's Redis, or a file of this server's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from adapters.registry.address import Address
from adapters.registry.client import Client
from adapters.registry.redis_store import RedisStore
from adapters.registry.sqlite_store import SqliteStore
from adapters.registry.store import Store


@asynccontextmanager
async def open_store(where: Address | Path, *, namespace: str = "coxswain") -> AsyncIterator[Store]:
    """Opens the registry, and looks at it once.

    Args:
        where: a Redis that replicas share, or the directory of a server that has none.
        namespace: one registry among several in one Redis.

    Raises:
        RegistryAway: it does not answer now, has another schema, or another server uses the
            directory.
    """
    if isinstance(where, Path):
        async with SqliteStore.opened(where) as sqlite_store:
            yield sqlite_store
        return
    client = Client(where)
    try:
        store = RedisStore(client, namespace)
        await store.read("")
        yield store
    finally:
        await client.close()
