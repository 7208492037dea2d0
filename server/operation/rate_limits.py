"""How much each caller may take per minute: requests and tokens, counted in Redis or here.

A window begins with a caller's first request and lasts a minute; when it is over, the next
request begins another. A request counts when it is let in. Its tokens count when it ends, because
nobody knows them before: those that run then may carry a caller past its limit, and what they
took counts in the window in which they end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from adapters.registry.address import Address
from adapters.registry.client import Client
from server.errors import HttpError
from server.settings.config import Config
from server.settings.operating import Rate

logger = logging.getLogger("coxswain")

WINDOW_S = 60

ANSWER_S = 0.5
"""How long Redis may take; every request waits for it."""

AGAIN_S = 5.0
"""How long a Redis that did not answer is left alone."""

_ADMIT = """
for _, key in ipairs(KEYS) do
  -- Redis's clock was set back: the window would last that much longer.
  if redis.call('PTTL', key) > tonumber(ARGV[3]) then redis.call('PEXPIRE', key, ARGV[3]) end
end
local wait = function(key) return math.max(redis.call('PTTL', key), 1) end
if ARGV[2] ~= '' and tonumber(redis.call('GET', KEYS[2]) or '0') >= tonumber(ARGV[2]) then
  return {'tokens_per_minute', wait(KEYS[2])}
end
if ARGV[1] ~= '' and tonumber(redis.call('GET', KEYS[1]) or '0') >= tonumber(ARGV[1]) then
  return {'requests_per_minute', wait(KEYS[1])}
end
if redis.call('INCR', KEYS[1]) == 1 then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return {'', 0}
"""

_CHARGE = """
local tokens = tonumber(ARGV[1])
if redis.call('INCRBY', KEYS[1], tokens) == tokens then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
"""


@dataclass
class _Window:
    """One count. `end_s` is in `time.monotonic()`."""

    count: int = 0
    end_s: float = 0.0

    def left_s(self) -> float:
        """Seconds until it is over; begins anew if it is."""
        now = time.monotonic()
        if now >= self.end_s:
            self.count = 0
        return self.end_s - now

    def add(self, amount: int) -> None:
        """Counts."""
        if self.left_s() <= 0:
            self.end_s = time.monotonic() + WINDOW_S
        self.count += amount


@dataclass
class _Here:
    """The counts of a single replica, by caller: there are as many as keys."""

    requests: dict[str, _Window] = field(default_factory=dict)
    tokens: dict[str, _Window] = field(default_factory=dict)

    def admit(self, caller: str, rate: Rate) -> tuple[str, float]:
        """(what is used up or '', seconds until it is not)."""
        requests = self.requests.setdefault(caller, _Window())
        tokens = self.tokens.setdefault(caller, _Window())
        for window, most, what in (
            (tokens, rate.tokens_per_minute, "tokens_per_minute"),
            (requests, rate.requests_per_minute, "requests_per_minute"),
        ):
            left_s = window.left_s()
            if most is not None and window.count >= most:
                return what, left_s
        requests.add(1)
        return "", 0.0

    def charge(self, caller: str, tokens: int) -> None:
        """Counts tokens."""
        self.tokens.setdefault(caller, _Window()).add(tokens)


class RateLimits:
    """One per replica, on its event loop. Replicas with the same Redis and namespace share counts.

    While Redis is away each replica counts for itself, with the same limits: callers are neither
    shut out nor let off.

    Args:
        default: for callers without rates of their own.
        address: of a Redis; None: counts stay in this process.
        namespace: as the registry's.
    """

    def __init__(
        self, default: Rate, address: Address | None = None, namespace: str = "coxswain"
    ) -> None:
        self._default, self._namespace = default, namespace
        self._here = _Here()
        self._redis: Client | None = None
        self._again_s = 0.0
        self._charging: set[asyncio.Task[None]] = set()
        self.away = False
        """Whether a Redis is configured and does not answer."""
        if address is not None:
            # Retries and reconnects would keep requests waiting.
            self._redis = Client(address, timeout_s=ANSWER_S, retries=0)

    @classmethod
    def of(cls, config: Config) -> RateLimits:
        """What callers may take, counted where the configuration says."""
        section, registry = config.limits, config.registry
        address = section.address or (registry.address if registry else None)
        return cls(section, address, registry.namespace if registry else "coxswain")

    async def admit(self, caller: str, rate: Rate | None) -> None:
        """Lets a request pass and counts it; or raises.

        Args:
            caller: fingerprint of the key.
            rate: the key's own; None: the default.

        Raises:
            HttpError: 429, with the time until the window is over.
        """
        rate = rate or self._default
        if not rate.limits:
            return
        most = [rate.requests_per_minute, rate.tokens_per_minute]
        asked = ["" if each is None else each for each in most]
        keys = [self._key(caller, "requests"), self._key(caller, "tokens")]
        answer = await self._run(_ADMIT, keys, [*asked, WINDOW_S * 1000])
        if answer is None:
            what, left_s = self._here.admit(caller, rate)
        else:
            what, left_s = answer[0].decode(), answer[1] / 1000
        if what:
            limit = getattr(rate, what)
            raise HttpError(
                429, f"This key's limit of {limit} {what.replace('_', ' ')} is used up.",
                retry_after_s=max(1, math.ceil(left_s)), reason=what,
            )  # fmt: skip

    def charge(self, caller: str, rate: Rate | None, tokens: int) -> None:
        """Counts the tokens of a request that has ended; nobody waits for it."""
        rate = rate or self._default
        if tokens and rate.tokens_per_minute is not None:
            task = asyncio.create_task(self._charge(caller, tokens))
            self._charging.add(task)
            task.add_done_callback(self._charging.discard)

    async def _charge(self, caller: str, tokens: int) -> None:
        keys, values = [self._key(caller, "tokens")], [tokens, WINDOW_S * 1000]
        if await self._run(_CHARGE, keys, values, nothing=True) is None:
            self._here.charge(caller, tokens)

    def _key(self, caller: str, what: str) -> str:
        # The braces keep a caller's keys on one node of a cluster.
        return f"{{{self._namespace}:rates:{caller}}}:{what}"

    async def _run(
        self, script: str, keys: list[str], values: list[Any], *, nothing: bool = False
    ) -> Any:
        """What a script answers; None: Redis is away, or there is none.

        Args:
            script: in Lua.
            keys: that it uses.
            values: its other arguments.
            nothing: it answers nothing; then the result is True.
        """
        if self._redis is None or time.monotonic() < self._again_s:
            return None
        try:
            async with asyncio.timeout(2 * ANSWER_S):
                answer = await self._redis.run(script, keys, values)
        except (RedisError, OSError, TimeoutError) as error:
            self._again_s = time.monotonic() + AGAIN_S
            if not self.away:
                logger.warning("rates: Redis is away (%s); this replica counts for itself", error)
            self.away = True
            return None
        if self.away:
            logger.warning("rates: Redis answers again")
        self.away = False
        return True if nothing else answer

    async def close(self) -> None:
        """Counts what is still to be counted, and closes the connection."""
        await asyncio.gather(*self._charging)
        if self._redis is not None:
            await self._redis.close()
