"""The registry's bytes in Redis: three Lua scripts and five keys.

Keys share one hash tag, so that they live on one node of a cluster:

    {ns}:head      hash: schema, id (random, made with the registry), count (of writes), token (of
                   the last one)
    {ns}:records   hash: name → token and record as JSON
    {ns}:log       list: token and name of the last writes, newest first
    {ns}:pins      set: names of the records that are pinned
    {ns}:replicas  hash: replica → Unix ms until which it counts as alive (Redis's clock)

beside them one string `{ns}:progress:{name}` for each adapter that is being fetched, which expires,
and one pub/sub channel `{ns}:changed`, which is only a hint.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from redis.exceptions import RedisError, ResponseError

from adapters.errors import RegistryAway
from adapters.registry.client import Client, check_cancelled
from adapters.registry.record import SCHEMA, Record, decode, encode
from adapters.registry.store import (
    LOG,
    TOKEN,
    Changes,
    Position,
    Swapped,
    Wait,
    new_token,
)

_PAGE = 256
"""Records that are read at a time: a few milliseconds of the event loop."""

_PROGRESS_MS = 15_000

_HEAD = """
local head, records, log = KEYS[1], KEYS[2], KEYS[3]
local schema, id, count, token = unpack(redis.call('HMGET', head, 'schema', 'id', 'count', 'token'))
if not schema then
  schema, id, count, token = ARGV[1], ARGV[2], '0', ''
  redis.call('HSET', head, 'schema', schema, 'id', id, 'count', count, 'token', token)
elseif schema ~= ARGV[1] then
  return redis.error_reply('SCHEMA ' .. schema)
end
"""

_LOOK = (
    _HEAD
    + """
-- ARGV: schema, id if new, known id, count and token, replica, its time to live in ms, page,
-- letters of a token
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ttl, page, letters = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
if ttl > 0 then
  redis.call('HSET', KEYS[5], ARGV[6], now + ttl)
end
local alive = {}
local replicas = redis.call('HGETALL', KEYS[5])
for i = 1, #replicas, 2 do
  local ends = tonumber(replicas[i + 1])
  if ttl > 0 and ends > now + ttl then
    -- Written before this clock was set back: a replica that is dead would count as alive for long.
    redis.call('HSET', KEYS[5], replicas[i], now + ttl)
  end
  if ends > now then
    alive[#alive + 1] = replicas[i]
  else
    redis.call('HDEL', KEYS[5], replicas[i])
  end
end
local total = redis.call('HLEN', records)
local behind = tonumber(count) - tonumber(ARGV[4])
local known = id == ARGV[3] and behind >= 0
if known and behind == 0 then
  known = token == ARGV[5]
elseif known then
  local seen = redis.call('LINDEX', log, behind)
  known = seen and string.sub(seen, 1, letters) == ARGV[5]
end
if not known then
  return {id, count, token, total, alive, 1}
end
local changed, left = {}, math.max(behind - page, 0)
if behind > 0 then
  local lines, seen = redis.call('LRANGE', log, left, behind - 1), {}
  for i = #lines, 1, -1 do
    local name = string.sub(lines[i], letters + 1)
    if not seen[name] then
      seen[name] = true
      changed[#changed + 1] = name
      changed[#changed + 1] = redis.call('HGET', records, name) or ''
    end
  end
  token = string.sub(lines[1], 1, letters)
end
return {id, tonumber(count) - left, token, total, alive, 0, changed, left}
"""
)

_READ = (
    _HEAD
    + """
-- ARGV: schema, id if new, id that is meant ('': any), name
if ARGV[3] ~= '' and id ~= ARGV[3] then return redis.error_reply('LOST') end
return redis.call('HGET', records, ARGV[4])
"""
)

_SWAP = (
    _HEAD
    + """
-- ARGV: schema, id if new, id that is meant ('': any), name, token of the record ('': there is
-- none), new token, record ('': delete), 1 if pinned, most pins ('': any), channel, longest log,
-- letters of a token
if ARGV[3] ~= '' and id ~= ARGV[3] then return redis.error_reply('LOST') end
local name, fresh, record, pinned = ARGV[4], ARGV[6], ARGV[7], ARGV[8] == '1'
local is = redis.call('HGET', records, name)
local seen = is and string.sub(is, 1, tonumber(ARGV[12])) or ''
-- A client repeats a call whose answer was lost: its own change is then already there.
if seen == fresh or (record == '' and not is and token == fresh) then return {'done', 0} end
if seen ~= ARGV[5] then return {'other', 0} end
if pinned and ARGV[9] ~= '' and redis.call('SISMEMBER', KEYS[4], name) == 0 then
  local pins = redis.call('SCARD', KEYS[4])
  if pins >= tonumber(ARGV[9]) then return {'pins', pins} end
end
redis.call(pinned and 'SADD' or 'SREM', KEYS[4], name)
if record == '' then
  redis.call('HDEL', records, name)
else
  redis.call('HSET', records, name, fresh .. record)
end
redis.call('HSET', head, 'count', count + 1, 'token', fresh)
redis.call('LPUSH', log, fresh .. name)
redis.call('LTRIM', log, 0, ARGV[11] - 1)
redis.call('PUBLISH', ARGV[10], fresh)
return {'done', 0}
"""
)


class RedisStore:
    """See `Store`.

    Args:
        client: the caller closes it.
        namespace: one registry among several in one Redis.
    """

    def __init__(self, client: Client, namespace: str = "coxswain") -> None:
        self.client, self._tag = client, f"{{{namespace}}}"
        names = ("head", "records", "log", "pins", "replicas")
        self._keys = [f"{self._tag}:{name}" for name in names]
        self.channel = f"{self._tag}:changed"
        self.registry = ""

    async def look(self, since: Position, *, replica: str = "", alive_ms: int = 0) -> Changes:
        """See `Store`."""
        reply = await self._run(_LOOK, *since, replica, alive_ms, _PAGE, TOKEN)
        position = Position(reply[0].decode(), int(reply[1]), reply[2].decode())
        alive = frozenset(name.decode() for name in reply[4])
        if reply[5]:
            return await self._whole(position, alive)
        flat = iter(reply[6])
        records = {name.decode(): _record(raw) for name, raw in zip(flat, flat, strict=True)}
        return Changes(position, records, more=reply[7] > 0, total=reply[3], alive=alive)

    async def _whole(self, position: Position, alive: frozenset[str]) -> Changes:
        """All records. Those that change meanwhile may be old or new: the next look brings them."""
        records: dict[str, Record | None] = {}
        cursor: Any = 0
        while True:
            page = self.client.redis.hscan(self._keys[1], cursor, count=_PAGE)
            cursor, values = await self._answered(page)
            for name, raw in values.items():
                records[name.decode()] = _record(raw)
            if not int(cursor):
                break
        return Changes(position, records, whole=True, more=True, alive=alive)

    async def read(self, name: str) -> Record | None:
        """See `Store`."""
        return _record(await self._run(_READ, self.registry, name))

    async def swap(
        self, name: str, old: str, new: Record | None, token: str, *,
        most_pins: int | None = None, into: str | None = None,
    ) -> Swapped:  # fmt: skip
        """See `Store`."""
        reply = await self._run(
            _SWAP, self.registry if into is None else into, name, old, token,
            encode(new) if new else b"", int(bool(new and new.pinned)),
            "" if most_pins is None else most_pins, self.channel, LOG, TOKEN,
        )  # fmt: skip
        return Swapped(reply[0].decode(), int(reply[1]))

    async def tell_progress(self, name: str, job: str, done_bytes: int) -> None:
        """See `Store`."""
        text = f"{job} {done_bytes}"
        await self._answered(self.client.redis.set(self._told(name), text, px=_PROGRESS_MS))

    async def progress(self, jobs: Mapping[str, str]) -> dict[str, int]:
        """See `Store`."""
        names = list(jobs)
        keys = [self._told(name) for name in names]
        values = await self._answered(self.client.redis.mget(keys)) if keys else []
        fetched = {}
        for name, value in zip(names, values, strict=True):
            job, _, done = (value or b"").decode().partition(" ")
            if done and job == jobs[name]:
                fetched[name] = int(done)
        return fetched

    def _told(self, name: str) -> str:
        return f"{self._tag}:progress:{name}"

    @asynccontextmanager
    async def hints(self) -> AsyncIterator[Wait]:
        """See `Store`."""
        async with self.client.redis.pubsub() as subscription:
            await self._answered(subscription.subscribe(self.channel))

            async def wait(seconds: float) -> None:
                while True:
                    message = subscription.get_message(timeout=seconds)
                    if await self._answered(message) is None:
                        return
                    seconds = 0.0  # takes all that are there

            yield wait

    async def leave(self, replica: str) -> None:
        """See `Store`."""
        await self._answered(self.client.redis.hdel(self._keys[4], replica))

    async def _run(self, script: str, *args: object) -> Any:
        return await self._answered(
            self.client.run(script, self._keys, [SCHEMA, new_token(), *args])
        )

    async def _answered(self, call: Any) -> Any:
        try:
            return await check_cancelled(call)
        except ResponseError as error:
            raise RegistryAway(*_refusal(str(error)), field="registry.url") from error
        except (RedisError, OSError) as error:
            raise RegistryAway(f"Redis does not answer: {error}") from error


def _refusal(message: str) -> tuple[str]:
    """What an error that Redis answers means."""
    if "SCHEMA " in message:
        schema = message.rpartition("SCHEMA ")[2].split()[0]
        return (f"the registry in Redis has schema {schema}; this server knows {SCHEMA}",)
    if "LOST" in message:
        return ("Redis has lost the registry; what this replica knows of it is being put back",)
    return (f"Redis refuses: {message}",)


def _record(raw: bytes | None) -> Record | None:
    return decode(raw[TOKEN:], raw[:TOKEN].decode()) if raw else None
