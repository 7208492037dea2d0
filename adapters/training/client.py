"""Asks a server that may be full, starting or away for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from adapters.training.errors import BadRecipe

_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Peer:
    """Who is asked.

    Args:
        url: its address.
        flag: of the command line, where the address comes from.
        remedy: what to do where it does not answer.
        key: sent as a bearer token.
        timeout_s: seconds that one request may take.
        patience_s: seconds for which a request is tried again.
        connections: at a time; ≥ 1.
    """

    url: str
    flag: str
    remedy: str
    key: str | None = None
    timeout_s: float = 600.0
    patience_s: float = 300.0
    connections: int = 8

    def check(self) -> None:
        """Raises BadRecipe where the address is not one."""
        try:
            good = httpx.URL(self.url).scheme in ("http", "https") and bool(
                httpx.URL(self.url).host
            )
        except httpx.InvalidURL:
            good = False
        if not good:
            raise BadRecipe(
                "not an address",
                field=self.flag,
                value=self.url,
                allowed="http://HOST:PORT or https://HOST:PORT",
            )

    def client(self) -> httpx.AsyncClient:
        """A client for one event loop."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=self.timeout_s,
            limits=httpx.Limits(max_connections=self.connections),
        )


async def ask(
    client: httpx.AsyncClient,
    peer: Peer,
    verb: str,
    path: str,
    body: Mapping[str, Any] | None,
    where: str,
    *,
    patient: bool = True,
) -> Any:
    """The JSON of one answer; asks again where the server has no room (429, 5xx) or is away.

    Args:
        client: from `peer.client()`.
        peer: see there.
        verb: of HTTP.
        path: below the peer's address, or a whole one.
        body: JSON value; None: nothing is sent.
        where: what is asked for, for errors.
        patient: whether a server that is not there may yet come.

    Raises:
        BadRecipe: it refuses, or does not answer in time.
    """
    until, pause_s = time.monotonic() + peer.patience_s, 0.5
    while True:
        wait_s = pause_s
        try:
            answer = await client.request(verb, path, json=body)
        except httpx.ReadTimeout:
            why = f"{peer.url} gives no answer within {peer.timeout_s:g} s"
            again = True
        except httpx.HTTPError as error:
            why = f"{peer.url} cannot be reached: {error or type(error).__name__}"
            again = patient
        else:
            if answer.status_code == 200:
                return _json(answer)
            why = f"{peer.url} answers {answer.status_code}: {_message(answer)}"
            again = answer.status_code == 429 or answer.status_code >= 500
            wait_s = max(wait_s, _retry_after_s(answer))
            if not again:
                raise BadRecipe(why, field=where)
        if not again or time.monotonic() + wait_s > until:
            raise BadRecipe(why, field=where, allowed=peer.remedy)
        await asyncio.sleep(wait_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _retry_after_s(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isdigit() else 0.0


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None  # The caller finds nothing in it, and says what it has looked for.


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return answer.text[:200] or answer.reason_phrase
