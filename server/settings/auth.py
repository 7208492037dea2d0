"""The section `auth`: who may call. Keys are hashed as they are read; none is kept.

Keys are long and random, so a plain SHA-256 is enough: there is nothing to guess, and a slow hash
would be paid for at every request.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

from pydantic import BeforeValidator, Field, SecretBytes

from server.settings.operating import Rate, Section
from server.validation import is_unicode

HASHED = "sha256:"
"""What a hashed key in the configuration begins with."""

GROUP = r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$"
"""Names of groups of keys."""


def digest(key: bytes) -> bytes:
    """The SHA-256 of a key, 32 bytes."""
    return hashlib.sha256(key).digest()


def digests_of_header(key: str) -> tuple[bytes, ...]:
    """The possible hashes of a key in a header.

    Clients send letters outside ASCII as UTF-8 or as Latin-1 (RFC 9110, section 5.5, leaves the
    bytes open); configured keys are hashed as UTF-8.

    Args:
        key: the header's text as ASGI servers give it: its bytes, decoded as Latin-1.

    Returns:
        One hash; two where the two ways differ.
    """
    raw = key.encode("latin-1")
    return (digest(raw),) if key.isascii() else (digest(raw), digest(key.encode()))


def _read(key: object) -> object:
    """The hash of a key; a hash as it is.

    Raises:
        ValueError: no client could send it.
    """
    if isinstance(key, SecretBytes):
        return key
    if not isinstance(key, str):
        raise ValueError("a key must be text; put it in quotes")
    if not key.strip():
        raise ValueError("a key must not be empty")
    if not is_unicode(key):
        raise ValueError("a key must be Unicode text")
    if key.startswith(HASHED):
        if not re.fullmatch(r"[0-9a-f]{64}", key.removeprefix(HASHED)):
            raise ValueError(f"after {HASHED} come 64 lower-case hex digits")
        return SecretBytes(bytes.fromhex(key.removeprefix(HASHED)))
    if key != key.strip() or any(letter < " " or letter == "\x7f" for letter in key):
        raise ValueError("a key must have no control characters, and no blanks at its ends: "
                         "headers cannot carry them")  # fmt: skip
    return SecretBytes(digest(key.encode()))


Key = Annotated[SecretBytes, BeforeValidator(_read)]
"""The SHA-256 of a key, 32 bytes; read from the key itself, or from `sha256:` and its hash."""


class LimitedKey(Rate):
    """A key with limits of its own. A rate that is not given is that of the section `limits`;
    `null`: no limit.
    """

    key: Key = Field(description="The key, or `sha256:` and its hash.")
    group: str | None = Field(
        None,
        pattern=GROUP,
        description="A name. Keys of one group share cached prefixes and private adapters. "
        "Absent: the key is a group of its own, `key:` and the first 8 hex digits of its SHA-256.",
    )
    profiles: tuple[str, ...] | None = Field(
        None,
        description="The profiles it may use, by name, as they are; it may then send no steering "
        "of its own, and sees no other profile. The base without steering stays open to it. "
        "Absent: all profiles, and its own steering.",
    )
    adapters: tuple[str, ...] | None = Field(
        None,
        description="The adapters it may use, by name; it sees no others. Absent: all that are "
        "not private to others.",
    )


def _as_object(entry: object) -> object:
    return {"key": entry} if isinstance(entry, str) else entry


class AuthConfig(Section):
    """Keys. An empty list and no key mean: no authentication."""

    api_keys: tuple[Annotated[LimitedKey, BeforeValidator(_as_object)], ...] = Field(
        (),
        description="Keys for `/v1/*` and tokenisation (environment: `COXSWAIN_API_KEYS`, "
        "separated by commas). Each is the key itself, or `sha256:` and the hex SHA-256 of it "
        "(`printf %s KEY | sha256sum`), or an object with limits.",
    )
    admin_key: Key | None = Field(
        None,
        description="Key for `/admin/*` (environment: `COXSWAIN_ADMIN_KEY`), plain or `sha256:…`. "
        "Without one the admin API answers only callers on this machine, of a server that is "
        "bound to loopback; behind a proxy or a unix socket it needs a key.",
    )
    metrics_key: Key | None = Field(
        None,
        description="Key for `/metrics`, plain or `sha256:…`; the admin key opens it too. Without "
        "one `/metrics` is open, unless an API key is limited to profiles or adapters: its labels "
        "have the names of all.",
    )


__all__ = ["HASHED", "AuthConfig", "Key", "LimitedKey", "digest", "digests_of_header"]
