"""The registry's bytes in Redis: three Lua scripts, four keys, nothing else.

Keys share one hash tag, so that they live on one node of a cluster:

    {ns}:head      hash: schema, epoch (random, made with the registry), revision (counts writes)
    {ns}:records   hash: name → record as JSON
    {ns}:written   hash: name → the revision that wrote it
    {ns}:replicas  hash: replica → Unix ms until which it counts as alive (Redis's clock)

and one pub/sub channel `{ns}:changed`, which is only a hint: whoever misses it finds the new
revision at its next look. Every change is compare-and-set on the record's revision.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from adapters.errors import RegistryAway
from adapters.registry.record import SCHEMA, Record, decode, encode

_HEAD = """
local head = KEYS[1]
local schema = redis.call('HGET', head, 'schema')
if not schema then
  redis.call('HSET', head, 'schema', ARGV[1], 'epoch', ARGV[2], 'revision', '0')
elseif schema ~= ARGV[1] then
  return redis.error_reply('SCHEMA ' .. schema)
end
"""

_LOOK = (
    _HEAD
    + """
-- ARGV: schema, epoch if new, known position, replica, its time to live in ms
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if tonumber(ARGV[5]) > 0 then
  redis.call('HSET', KEYS[4], ARGV[4], now + ARGV[5])
end
local alive = {}
local replicas = redis.call('HGETALL', KEYS[4])
for i = 1, #replicas, 2 do
  local ends, longest = tonumber(replicas[i + 1]), now + ARGV[5]
  if tonumber(ARGV[5]) > 0 and ends > longest then
    -- Written before this clock was set back: a replica that is dead would count as alive for long.
    redis.call('HSET', KEYS[4], replicas[i], longest)
  end
  if ends > now then
    alive[#alive + 1] = replicas[i]
  else
    redis.call('HDEL', KEYS[4], replicas[i])
  end
end
local position = redis.call('HGET', head, 'epoch') .. ':' .. redis.call('HGET', head, 'revision')
if position == ARGV[3] then
  return {position, alive}
end
return {position, alive, redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3])}
"""
)

_READ = (
    _HEAD
    + """
-- ARGV: schema, epoch if new, name
local position = redis.call('HGET', head, 'epoch') .. ':' .. redis.call('HGET', head, 'revision')
return {position, redis.call('HGET', KEYS[2], ARGV[3]), redis.call('HGET', KEYS[3], ARGV[3])}
"""
)

_SWAP = (
    _HEAD
    + """
-- ARGV: schema, epoch if new, name, expected revision of the record ('0': there is none),
-- expected position of the registry ('': any), record ('': delete), channel
local is = redis.call('HGET', KEYS[3], ARGV[3]) or '0'
local position = redis.call('HGET', head, 'epoch') .. ':' .. redis.call('HGET', head, 'revision')
if is ~= ARGV[4] or (ARGV[5] ~= '' and ARGV[5] ~= position) then
  -- A client repeats a call whose answer was lost: its own change is then already there.
  if ARGV[6] ~= '' and redis.call('HGET', KEYS[2], ARGV[3]) == ARGV[6] then
    return tonumber(is)
  end
  return -1
end
local revision = redis.call('HINCRBY', head, 'revision', 1)
if ARGV[6] == '' then
  redis.call('HDEL', KEYS[2], ARGV[3])
  redis.call('HDEL', KEYS[3], ARGV[3])
else
  redis.call('HSET', KEYS[2], ARGV[3], ARGV[6])
  redis.call('HSET', KEYS[3], ARGV[3], revision)
end
redis.call('PUBLISH', ARGV[7], revision)
return revision
"""
)


@dataclass(frozen=True)
class Snapshot:
    """The registry at one moment.

    Args:
        position: epoch and revision; changes with every write.
        records: by name.
        alive: replicas whose lease has not run out.
    """

    position: str
    records: Mapping[str, Record] = field(default_factory=dict)
    alive: frozenset[str] = frozenset()

    def before(self, other: Snapshot) -> bool:
        """Whether writes that `other` has seen came after it."""
        (epoch, _, mine), (same, _, theirs) = (one.position.partition(":") for one in (self, other))
        return bool(mine and theirs) and epoch == same and int(mine) < int(theirs)


NOTHING = Snapshot("")
"""Before the first look."""


class Store:
    """Reads and swaps records. Lives on one event loop.

    Args:
        client: with `decode_responses=False`; the caller closes it.
        namespace: one registry among several in one Redis.
    """

    def __init__(self, client: Redis, namespace: str = "coxswain") -> None:
        self._client = client
        tag = f"{{{namespace}}}"
        self._keys = [f"{tag}:{key}" for key in ("head", "records", "written", "replicas")]
        self.channel = f"{tag}:changed"
        self._epoch = secrets.token_hex(6)
        self._look = client.register_script(_LOOK)
        self._read = client.register_script(_READ)
        self._swap = client.register_script(_SWAP)

    async def look(
        self, known: Snapshot = NOTHING, *, replica: str = "", alive_ms: int = 0
    ) -> Snapshot:
        """The registry now; renews a replica's lease on the way.

        Args:
            known: the last snapshot; its records are used again if nothing was written since.
            replica: whose lease.
            alive_ms: for how long, in milliseconds; 0: no lease is written.

        Raises:
            RegistryAway: Redis does not answer, or the schema is another one.
        """
        answer = await self._run(self._look, [known.position, replica, alive_ms])
        position = cast(bytes, answer[0]).decode()
        alive = frozenset(cast(bytes, name).decode() for name in answer[1])
        if len(answer) == 2:
            return Snapshot(position, known.records, alive)
        written = _pairs(answer[3])
        records = {
            name: decode(raw, int(written.get(name, b"0")))
            for name, raw in _pairs(answer[2]).items()
        }
        return Snapshot(position, MappingProxyType(records), alive)

    async def read(self, name: str) -> tuple[str, Record | None]:
        """The registry's position and one record.

        Raises:
            RegistryAway: as `look`.
        """
        position, raw, revision = await self._run(self._read, [name])
        return position.decode(), decode(raw, int(revision)) if raw is not None else None

    async def swap(
        self, name: str, old: Record | None, new: Record | None, *, position: str = ""
    ) -> int | None:
        """Replaces a record if it is still the one that the caller saw.

        Args:
            name: whose.
            old: what the caller saw; None: no record.
            new: what it becomes; None: it is deleted.
            position: if given, nothing at all may have been written since.

        Returns:
            The new revision; None if another change came first.

        Raises:
            RegistryAway: Redis does not answer (the change may or may not have been made).
        """
        expected = str(old.revision) if old else "0"
        raw = encode(new) if new else b""
        revision = await self._run(self._swap, [name, expected, position, raw, self.channel])
        return None if revision == -1 else int(revision)

    async def leave(self, replica: str) -> None:
        """Ends a replica's lease, so that others need not wait for it to run out."""
        try:
            await heeding(self._client.hdel(self._keys[3], replica))
        except RedisError as error:
            raise RegistryAway(f"Redis does not answer: {error}") from error

    async def _run(self, script: Any, args: list[object]) -> Any:
        try:
            return await heeding(script(keys=self._keys, args=[SCHEMA, self._epoch, *args]))
        except ResponseError as error:
            if "SCHEMA " in str(error):
                found = str(error).rpartition("SCHEMA ")[2]
                raise RegistryAway(
                    f"the registry in Redis has schema {found}; this server knows {SCHEMA}",
                    field="registry.url",
                ) from error
            raise RegistryAway(f"Redis refuses: {error}") from error
        except (RedisError, OSError) as error:
            raise RegistryAway(f"Redis does not answer: {error}") from error


async def heeding(call: Awaitable[Any]) -> Any:
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


def _pairs(answer: Any) -> dict[str, bytes]:
    """A reply of HGETALL inside a script: name, value, name, value, …"""
    flat = list(answer)
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}
