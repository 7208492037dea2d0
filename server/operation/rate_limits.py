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
from dataclasses import dataclass
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

AT_ONCE = 32
"""Questions to Redis at the same time; more of them wait. redis-py opens at most 100 connections,
and raises an error for one more, which would look as if Redis were away."""

_TAKE = """
local window = tonumber(ARGV[1])
local taken = function(key)
  -- Redis's clock was set back: the window would last that much longer.
  if redis.call('PTTL', key) > window then redis.call('PEXPIRE', key, window) end
  return tonumber(redis.call('GET', key) or '0')
end
local refused = 0
for i = 2, 1, -1 do
  local limit = tonumber(ARGV[1 + i])
  if taken(KEYS[i]) >= limit and limit > 0 and refused == 0 then refused = i end
end
local answer = {refused}
for i, key in ipairs(KEYS) do
  local amount = tonumber(ARGV[3 + i])
  -- Tokens have been used by now, so they count in any case.
  if amount > 0 and (i == 2 or refused == 0) and redis.call('INCRBY', key, amount) == amount then
    redis.call('PEXPIRE', key, window)
  end
  table.insert(answer, taken(key))
  table.insert(answer, math.max(redis.call('PTTL', key), 0))
end
return answer
"""
"""Keys: a caller's requests and tokens. Arguments: milliseconds of a window; the limits of both (0:
none); how many of both to count. Answers: which of the two, 1 or 2, is used up (0: neither; else no
request is counted); of each, the count and the milliseconds until it begins anew."""

_NAMES = ("requests", "tokens")


@dataclass(frozen=True)
class Standing:
    """A caller's use of its limits in the present minute.

    Args:
        limits: of requests and tokens; 0: none.
        taken: of both.
        left_s: seconds until they begin anew; 0: nothing is taken.
        refused: which of the two let no more pass: 1 or 2; 0: neither.
    """

    limits: tuple[int, int]
    taken: tuple[int, int]
    left_s: tuple[float, float]
    refused: int = 0

    @property
    def refusal(self) -> HttpError | None:
        """429 if nothing more may pass, with the time until the window is over."""
        if not self.refused:
            return None
        i = self.refused - 1
        return HttpError(
            429, f"This key's limit of {self.limits[i]} {_NAMES[i]} per minute is used up.",
            retry_after_s=max(1, math.ceil(self.left_s[i])), reason=f"{_NAMES[i]}_per_minute",
        )  # fmt: skip

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-…` of an answer, as OpenAI's API has them."""
        fields = {}
        for name, limit, taken, left_s in zip(
            _NAMES, self.limits, self.taken, self.left_s, strict=True
        ):
            if limit:
                fields[f"limit-{name}"] = str(limit)
                fields[f"remaining-{name}"] = str(max(0, limit - taken))
                fields[f"reset-{name}"] = duration(left_s)
        return [(f"x-ratelimit-{name}".encode(), text.encode()) for name, text in fields.items()]


def duration(seconds: float) -> str:
    """Rounded up, as `6m0s` or `1s`."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


@dataclass
class _Window:
    """One count. `end_s` is in `time.monotonic()`."""

    count: int = 0
    end_s: float = 0.0

    def taken(self, amount: int = 0) -> tuple[int, float]:
        """Counts; returns the count and the seconds until it begins anew."""
        now = time.monotonic()
        if now >= self.end_s:
            self.count, self.end_s = 0, now + WINDOW_S
        self.count += amount
        return self.count, self.end_s - now if self.count else 0.0


class _Here:
    """The counts of a single replica, by caller: there are as many as keys. As `_TAKE`."""

    def __init__(self) -> None:
        self._windows: dict[str, tuple[_Window, _Window]] = {}

    def take(self, caller: str, limits: tuple[int, int], amounts: tuple[int, int]) -> Standing:
        requests, tokens = self._windows.setdefault(caller, (_Window(), _Window()))
        refused = 0
        for i, window in ((2, tokens), (1, requests)):
            if window.taken()[0] >= limits[i - 1] > 0 and not refused:
                refused = i
        request_count, requests_s = requests.taken(0 if refused else amounts[0])
        token_count, tokens_s = tokens.taken(amounts[1])
        return Standing(limits, (request_count, token_count), (requests_s, tokens_s), refused)


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
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self._again_s = 0.0
        self._charging: set[asyncio.Task[Standing]] = set()
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

    async def admit(self, caller: str, rate: Rate | None, *, count: bool = True) -> Standing:
        """Whether a request may pass: then it is counted, unless `count` is false.

        Args:
            caller: fingerprint of the key.
            rate: the key's own; None: the default.
            count: false: nothing passes, somebody only wants to know.
        """
        return await self._take(caller, rate or self._default, (int(count), 0))

    def charge(self, caller: str, rate: Rate | None, tokens: int) -> None:
        """Counts the tokens of a request that has ended, in the background."""
        rate = rate or self._default
        if tokens and rate.tokens_per_minute is not None:
            task = asyncio.create_task(self._take(caller, rate, (0, tokens)))
            self._charging.add(task)
            task.add_done_callback(self._charging.discard)

    async def _take(self, caller: str, rate: Rate, amounts: tuple[int, int]) -> Standing:
        limits = (rate.requests_per_minute or 0, rate.tokens_per_minute or 0)
        if not rate.limits:
            return Standing(limits, (0, 0), (0.0, 0.0))
        keys = [self._key(caller, name) for name in _NAMES]
        answer = await self._run(keys, [WINDOW_S * 1000, *limits, *amounts])
        if answer is None:
            return self._here.take(caller, limits, amounts)
        refused, request_count, requests_ms, token_count, tokens_ms = answer
        return Standing(
            limits, (request_count, token_count), (requests_ms / 1000, tokens_ms / 1000), refused
        )

    def _key(self, caller: str, what: str) -> str:
        # The braces keep a caller's keys on one node of a cluster.
        return f"{{{self._namespace}:rates:{caller}}}:{what}"

    async def _run(self, keys: list[str], values: list[Any]) -> Any:
        """What `_TAKE` answers; None: Redis is away, or there is none."""
        if self._redis is None or time.monotonic() < self._again_s:
            return None
        try:
            async with asyncio.timeout(2 * ANSWER_S), self._at_once:
                answer = await self._redis.run(_TAKE, keys, values)
        except (RedisError, OSError, TimeoutError) as error:
            self._again_s = time.monotonic() + AGAIN_S
            if not self.away:
                logger.warning("rates: Redis is away (%s); this replica counts for itself", error)
            self.away = True
            return None
        if self.away:
            logger.warning("rates: Redis answers again")
        self.away = False
        return answer

    async def close(self) -> None:
        """Counts what is still to be counted, and closes the connection."""
        await asyncio.gather(*self._charging)
        if self._redis is not None:
            await self._redis.close()
