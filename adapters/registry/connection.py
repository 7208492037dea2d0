"""The registry's Redis: the operator's, or a private one; everything behind it is the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from adapters.errors import RegistryAway
from adapters.registry.embedded import EmbeddedRedis
from adapters.registry.store import Store


@dataclass(frozen=True)
class Connection:
    """A client and the registry behind it, on one event loop.

    Args:
        client: for subscriptions.
        store: for everything else.
        embedded: the private redis-server; None: the operator's.
    """

    client: Redis
    store: Store
    embedded: EmbeddedRedis | None = None


@asynccontextmanager
async def connect(
    url: str | None, directory: Path | None = None, *, namespace: str = "coxswain"
) -> AsyncIterator[Connection]:
    """Opens the registry; starts a redis-server of our own if there is no URL.

    Args:
        url: `redis://`, `rediss://` or `unix://`; None: embedded, in `directory`.
        directory: the embedded server's; survives restarts.
        namespace: one registry among several in one Redis.

    Raises:
        RegistryAway: Redis does not answer now, or the registry has another schema.
    """
    if url is not None:
        async with _client(url) as client:
            yield await _checked(client, namespace, None)
        return
    assert directory is not None, "without a URL the registry needs a directory"
    embedded = EmbeddedRedis(directory)
    await asyncio.to_thread(embedded.start)
    watch = asyncio.create_task(embedded.watch())
    try:
        async with _client(embedded.url) as client:
            yield await _checked(client, namespace, embedded)
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        await asyncio.to_thread(embedded.stop)


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[Redis]:
    # Connections in the pool may be dead since Redis was started again. Repeating a call is safe.
    once_more = Retry(NoBackoff(), 1, (exceptions.ConnectionError,))
    try:
        client = Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5, retry=once_more)
    except ValueError as error:
        raise RegistryAway(f"not a URL of a Redis: {error}", field="registry.url") from error
    try:
        yield client
    finally:
        await client.aclose()


async def _checked(client: Redis, namespace: str, embedded: EmbeddedRedis | None) -> Connection:
    store = Store(client, namespace)
    await store.look()
    return Connection(client, store, embedded)
