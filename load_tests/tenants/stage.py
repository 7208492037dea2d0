"""The server, and its two tenants."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ZOO = Path(__file__).resolve().parents[2] / "zoo"
NAMES = ("alpha", "bravo")
MATE = "alpha-mate"
"""Another key of the first tenant's group, which shares its cache: what sharing looks like."""
NOBODY = "nobod"
"""As long as the tenants' names, so that not even the length of an answer tells."""

ADMIN_KEY = "tenants-admin"
VOCABULARY = 1100
"""Ids below it are ordinary tokens of the zoo's tokenizer; the first are special."""
FIRST_ID = 20
PROMPT = 448
"""Tokens of a prompt: fourteen blocks of the cache."""
BLOCK = 32


def key_of(tenant: str) -> str:
    """Its API key."""
    return f"{tenant}-key"


def profile_of(tenant: str) -> str:
    """Its profile's name."""
    return f"{tenant}-chat"


def adapter_of(tenant: str) -> str:
    """Its adapter's name."""
    return f"{tenant}-ask"


def configuration(folder: Path) -> dict[str, Any]:
    """The server's. The two profiles steer alike: only the key separates their prefixes.

    Args:
        folder: gets the server's state.
    """
    rates = {"requests_per_minute": 1_000_000, "tokens_per_minute": 1_000_000_000}
    ask = str(ZOO / "adapters" / "ask")
    profile = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 1.0}
    keys = [
        {"key": key_of(key), "group": name, "profiles": [profile_of(name)], **rates}
        for key, name in ((NAMES[0], NAMES[0]), (MATE, NAMES[0]), (NAMES[1], NAMES[1]))
    ]
    # The first tenant's adapter is hidden from the second by the second's key, and the second's
    # from the first by being private to the second's group.
    keys[-1]["adapters"] = [adapter_of(NAMES[1])]
    visible: tuple[list[str], ...] = ([], [NAMES[1]])
    return {
        "model": str(ZOO / "models" / "base-large"),
        "served_model_name": "base",
        "streams": {
            "chat": {"model": str(ZOO / "models" / "chat-small")},
            "plain": {"model": str(ZOO / "models" / "base-small")},
        },
        "chat": {"template": str(ZOO / "chat_template.jinja")},
        "profiles": {profile_of(name): profile for name in NAMES},
        "adapters": {
            "roots": [str(ZOO / "adapters")],
            # The same content: only the name, and who may use it, differ.
            "preload": [
                {"name": adapter_of(name), "source": ask, "visible_to": groups}
                for name, groups in zip(NAMES, visible, strict=True)
            ],
            "max_loaded": 4,
        },
        "registry": {"directory": str(folder / "state")},
        "auth": {"admin_key": ADMIN_KEY, "api_keys": keys},
        "engine": {
            "max_model_len": 512,
            "max_num_seqs": 16,
            "block_size": BLOCK,
            # Nothing is pushed out of the cache while a prompt waits to be asked again.
            "kv_cache_memory_bytes": 1 << 30,
            "enforce_eager": True,
        },
    }


@dataclass
class Tenant:
    """One tenant's client.

    Args:
        name: its name.
        url: of the server.
    """

    name: str
    url: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {key_of(self.name)}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """One call."""
        return self.http.post(path, json=body)

    def ask(self, model: str, prompt: list[int], **more: Any) -> tuple[float, int]:
        """Asks for one token.

        Returns:
            Seconds to the first event, and how many of the prompt's tokens came from the cache.

        Raises:
            AssertionError: it was refused, or the answer does not say how many.
        """
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        first, usage = 0.0, None
        begin = time.perf_counter()
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                first = first or time.perf_counter() - begin
                if '"usage":{' in line:
                    usage = line
        assert answer.status_code == 200 and usage is not None, answer.status_code
        return first, cached_of(usage)


def cached_of(event: str) -> int:
    """`prompt_tokens_details.cached_tokens` of an event."""
    details = json.loads(event.removeprefix("data: "))["usage"]["prompt_tokens_details"]
    assert details is not None, "no prompt_tokens_details"
    return int(details["cached_tokens"] or 0)


class Prompts:
    """Random prompts that nobody has sent; safe to use from several threads.

    Args:
        seed: of the ids.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._count, self._lock = seed, itertools.count(), threading.Lock()

    def new(self, tokens: int = PROMPT) -> list[int]:
        """Another one."""
        with self._lock:
            number = next(self._count)
        dice = np.random.default_rng((self._seed, number))
        found: list[int] = dice.integers(FIRST_ID, VOCABULARY, tokens).tolist()
        return found
