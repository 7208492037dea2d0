"""A client of a Redis, whichever kind it is; runs scripts and closes what it opened."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Sequence
from typing import Any

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from adapters.registry.address import Address

_AT_ONCE = 48
"""Scripts that run at the same time, each on a connection: redis-py's pools have 100, and fail
the caller who asks for one more.
"""


class Client:
    """Lives on one event loop. Connects when it is first used.

    Args:
        address: of the Redis.
        timeout_s: for connecting, and for an answer, in seconds.
        retries: after a broken connection: those in the pool may be dead since Redis was started
            again. Every script of ours may be repeated.
    """

    def __init__(self, address: Address, *, timeout_s: float = 5.0, retries: int = 1) -> None:
        options: dict[str, Any] = {
            "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), retries, (exceptions.ConnectionError,)),
        }  # fmt: skip
        secure: dict[str, Any] = {}
        if address.tls:
            secure = {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True,
                      "ssl_ca_certs": address.ca_file}  # fmt: skip
        login: dict[str, Any] = {"username": address.user, "password": address.password}
        self._others: list[Redis] = []
        self.redis: Any
        """A `Redis` or a `RedisCluster`: both have the commands that we use."""
        if address.kind == "cluster":
            nodes = [ClusterNode(host, port) for host, port in address.hosts]
            self.redis = RedisCluster(startup_nodes=nodes, **login, **options, **secure)
        elif address.kind == "sentinel":
            sentinel_options = {**options, **secure, "password": address.sentinel_password}
            sentinels = Sentinel(list(address.hosts), sentinel_kwargs=sentinel_options)
            self._others = sentinels.sentinels
            self.redis = sentinels.master_for(
                address.service, db=address.database, **login, **options, **secure
            )
        elif address.kind == "unix":
            self.redis = Redis(unix_socket_path=address.path, db=address.database, **login,
                               **options)  # fmt: skip
        else:
            (host, port) = address.hosts[0]
            self.redis = Redis(host=host, port=port, db=address.database, **login, **options,
                               **secure)  # fmt: skip
        self._digests: dict[str, str] = {}
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Runs a script and returns its answer. Its keys must share a hash tag.

        Raises:
            redis.exceptions.RedisError, OSError: it cannot be had.
        """
        digest = self._digests.get(script)
        if digest is None:
            sha = hashlib.sha1(script.encode(), usedforsecurity=False)
            digest = self._digests[script] = sha.hexdigest()
        async with self._turns:
            try:
                return await self.redis.evalsha(digest, len(keys), *keys, *args)
            except exceptions.NoScriptError:
                return await self.redis.eval(script, len(keys), *keys, *args)

    async def close(self) -> None:
        """Gives all connections back."""
        for client in (self.redis, *self._others):
            await client.aclose()


async def check_cancelled(call: Awaitable[Any]) -> Any:
    """The call's result; raises CancelledError if the task was cancelled meanwhile.

    redis-py (seen in 8.1.0) loses a cancellation that meets its handshake of a new connection:
    the call goes on, and a task that loops over calls would never end.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        return await call
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
