"""Requests that no server should answer with anything but a refusal, as their bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from tests.faults.asking import KINDS
from tests.server.live import Server

CLOSED = 0
"""Stands for the status where the connection ends without an answer."""

Bad = tuple[bytes, frozenset[int]]
"""What is sent, and how it may be answered."""


def request(server: Server, body: bytes, path: str = "/v1/completions", **headers: object) -> bytes:
    """A request as its bytes; `headers` with _ for -, None leaves one out."""
    own = {"host": "x", "content-type": "application/json", "content-length": len(body)}
    given = {**own, **server.key(path), **{n.replace("_", "-"): v for n, v in headers.items()}}
    lines = [f"{name}: {value}" for name, value in given.items() if value is not None]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body


def good(dice: random.Random) -> dict[str, Any]:
    """A request that would be answered."""
    return {**dice.choice(KINDS).body({}), "stream": dice.random() < 0.5}


def broken_json(server: Server, dice: random.Random) -> Bad:
    """Cut off, with a character too many, or not UTF-8."""
    raw = json.dumps(good(dice)).encode()
    at = dice.randrange(1, len(raw) - 1)
    which = dice.choice(
        (raw[:at], raw + b"}", raw[:-1] + b',"user":"\xff\xfe"}', dice.randbytes(at))
    )
    return request(server, which), frozenset({400})


TUNED = {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain"}

WRONG: dict[str, tuple[object, ...]] = {
    "model": (17, [], {"a": 1}, True),
    "prompt": (None, True, {"a": 1}, 1.5, [], [[]], ["a", 1], [1.5], [-1], [10**9]),
    "max_tokens": ("six", [], {}, -1, 0, 1.5, 10**30, "NaN"),
    "temperature": ("hot", [], -1, 1e400, {}),
    "top_p": ("x", -1, 2, []),
    "n": ("x", 0, -1, 10**9, [], 1.5),
    "logprobs": ("x", -7, [], 10**6),
    "stream": ("perhaps", [], {}, 7),
    "seed": ("x", [], 1.5, 10**40),
    "stop": (5, [1], {"a": 1}),
    "steering": (5, [], True, {"method": 5}, {"strength": 1},
                 {"method": "mix", "weights": {"base": "x"}}, {"method": "mix", "weights": []},
                 {**TUNED, "strength": -1}, {**TUNED, "strength": "x"}, {**TUNED, "more": 1}),
    "adapters": ("a", 5, {"name": "a"}, [5], [{}], [{"name": 5}], [{"name": "a", "weight": "x"}],
                 [{"name": "a", "weight": 1e9}], [{"name": "a"}, {"name": "a"}]),
    "steer": (1,),
}  # fmt: skip
"""By field, values that it must not have."""


def wrong_type(server: Server, dice: random.Random) -> Bad:
    """A field of another type, or out of its range."""
    field = dice.choice(list(WRONG))
    # Infinity is JSON to Python, and to nobody else.
    body = json.dumps({**good(dice), field: dice.choice(WRONG[field])})
    return request(server, body.encode()), frozenset({400})


def nobody(server: Server, dice: random.Random) -> Bad:
    """Something that is not there."""
    absent = f"nobody{dice.randrange(10**6)}"
    changes: tuple[dict[str, Any], ...] = (
        {"model": absent}, {"adapters": [{"name": absent}]}, {"steering": absent},
        {"steering": {"method": absent}},
    )  # fmt: skip
    change = dice.choice(changes)
    return request(server, json.dumps({**good(dice), **change}).encode()), frozenset({404})


def nested(server: Server, dice: random.Random) -> Bad:
    """Deeper than anybody reads: closed or not, as the whole or as a field."""
    depth = dice.choice((100, 900, 5000, 40_000))
    left, right = dice.choice((("[", "]"), ('{"a":', "}")))
    inside = left * depth + "1" + right * depth * dice.randrange(2)
    field = dice.choice(("prompt", "steering", "adapters", "logit_bias"))
    body = dice.choice((inside, f'{{"model": "big", "prompt": "x", "{field}": {inside}}}'))
    return request(server, body[:90_000].encode()), frozenset({400})


def huge(server: Server, dice: random.Random) -> Bad:
    """More bytes than are allowed: announced, or in chunks that do not say how many follow."""
    most = server.config["server"]["max_body_bytes"]
    if dice.random() < 0.5:
        return request(
            server, b"{", content_length=dice.choice((most + 1, 10**9, 10**15))
        ), _TOO_LARGE
    head = request(server, b"", content_length=None, transfer_encoding="chunked")
    piece = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    return head + piece * (most // 0x8000 + 1), _TOO_LARGE


# Who goes on sending after a refusal may find the connection closed before having read it.
_TOO_LARGE = frozenset({413, CLOSED})


def wrong_length(server: Server, dice: random.Random) -> Bad:
    """A length that is none, or less than what follows."""
    raw = json.dumps(good(dice)).encode()
    length = dice.choice(("-5", "ten", "1.5", len(raw) - dice.randrange(1, 50)))
    return request(server, raw, content_length=length), frozenset({400})


def no_http(server: Server, dice: random.Random) -> Bad:
    """Bytes of some other kind."""
    raw = dice.choice((b"\x16\x03\x01" + dice.randbytes(200), b"HELO x\r\n\r\n", b"GET\r\n\r\n",
                       b"POST /v1/completions HTTP/9.9\r\n\r\n"))  # fmt: skip
    return raw, frozenset({400, CLOSED})


def unfinished(server: Server, dice: random.Random) -> Bad:
    """Part of the head or of the body; then the client is gone."""
    raw = request(server, json.dumps(good(dice)).encode())
    return raw[: dice.randrange(1, len(raw))], frozenset({CLOSED})


ALL: tuple[Callable[[Server, random.Random], Bad], ...] = (
    broken_json, wrong_type, nobody, nested, huge, wrong_length, no_http, unfinished,
)  # fmt: skip
"""All kinds; `unfinished` is for clients that do not wait for an answer."""
