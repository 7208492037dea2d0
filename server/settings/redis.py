"""The Redis that a configuration names: its address checked, its password from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from adapters.registry.address import Address, parse_address

PASSWORD = "COXSWAIN_REDIS_PASSWORD"
"""Variable with the password of every Redis whose URL has none."""

SENTINEL_PASSWORD = "COXSWAIN_SENTINEL_PASSWORD"
"""Variable with the password of the Sentinels, if they have one."""


def _check(text: str) -> str:
    """The URL itself.

    Raises:
        BadAddress: it is none of a Redis.
    """
    parse_address(text)
    return text


RedisUrl = Annotated[str, AfterValidator(_check)]
"""A setting; its text may hold a password, so its field has `repr=False`."""


def check_ca_file(url: str | None, ca_file: str | None, field: str) -> None:
    """Whether certificates can be used.

    Args:
        url: of the Redis.
        ca_file: its authority's certificates.
        field: the setting that has them.

    Raises:
        ValueError: they cannot.
    """
    if ca_file is None:
        return
    if url is None or not parse_address(url).tls:
        raise ValueError(f"{field}: certificates are for a Redis over TLS (rediss://)")
    if not Path(ca_file).is_file():
        raise ValueError(f"{field}: no such file: {ca_file}")


def address_of(url: str, ca_file: str | None, environ: Mapping[str, str] | None = None) -> Address:
    """A Redis, with what the environment adds.

    Args:
        url: checked before.
        ca_file: certificates that are trusted instead of the system's; checked before.
        environ: default: the process's.
    """
    env = os.environ if environ is None else environ
    address = parse_address(url)
    return replace(
        address,
        ca_file=ca_file,
        password=address.password or env.get(PASSWORD) or None,
        sentinel_password=env.get(SENTINEL_PASSWORD) or None,
    )
