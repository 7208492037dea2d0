"""The Redis that a configuration names: its address checked, its password from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator

from adapters.registry.address import Address, BadAddress, parse_address

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


def address_of(
    url: str, ca_file: str | None, field: str, environ: Mapping[str, str] | None = None
) -> Address:
    """A Redis, with what the environment adds.

    Args:
        url: checked before.
        ca_file: certificates that are trusted instead of the system's.
        field: the setting that has the URL.
        environ: default: the process's.

    Raises:
        BadAddress: the certificates cannot be used; begins with the field.
    """
    given = os.environ if environ is None else environ
    found = parse_address(url)
    if ca_file is not None and not found.tls:
        raise BadAddress(f"{field}: certificates are for rediss:// (TLS), and this is not")
    if ca_file is not None and not os.path.isfile(ca_file):
        raise BadAddress(f"{field}: no such file of certificates: {ca_file}")
    return replace(
        found,
        ca_file=ca_file,
        password=found.password or given.get(PASSWORD) or None,
        sentinel_password=given.get(SENTINEL_PASSWORD) or None,
    )
