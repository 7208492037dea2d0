"""Where a Redis is, as one text: a server, a server behind Sentinels, or a cluster.

    redis://[[user]:password@]host[:port][/database]
    redis+sentinel://[[user]:password@]host[:port][,host[:port]…]/service[/database]
    redis+cluster://[[user]:password@]host[:port][,host[:port]…]
    unix:///path/of/the.sock

`rediss`, `rediss+sentinel` and `rediss+cluster` use TLS. Needs the standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote, urlsplit

FORMS = (
    "redis://host:port/database, redis+sentinel://host:port,host:port/service/database, "
    "redis+cluster://host:port,host:port, each also with rediss (TLS); unix:///path"
)

Kind = Literal["server", "sentinel", "cluster", "unix"]

_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False), "rediss": ("server", True),
    "redis+sentinel": ("sentinel", False), "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False), "rediss+cluster": ("cluster", True),
    "unix": ("unix", False),
}  # fmt: skip

_PORTS = {"server": 6379, "sentinel": 26379, "cluster": 6379}

_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:,\[\]]+)(?::(?P<port>\d{1,5}))?")


class BadAddress(ValueError):
    """Not an address of a Redis: one sentence says why, without any password."""


@dataclass(frozen=True)
class Address:
    """A Redis.

    Args:
        kind: how it is reached.
        hosts: name and port; of the Sentinels, or of some nodes of the cluster.
        tls: whether connections are encrypted.
        path: of a unix socket.
        service: what the Sentinels call it.
        database: its number.
        user: None: the default one.
        password: None: none.
        ca_file: certificates that are trusted instead of the system's; with TLS.
        sentinel_password: of the Sentinels.
    """

    kind: Kind
    hosts: tuple[tuple[str, int], ...] = ()
    tls: bool = False
    path: str = ""
    service: str = ""
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)


def parse_address(text: str) -> Address:
    """The Redis that a text names.

    Raises:
        BadAddress: it names none.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise BadAddress(f"not an address of a Redis; allowed: {FORMS}")
    kind, tls = _SCHEMES[scheme]
    parts = urlsplit(f"//{rest}")
    if parts.query or parts.fragment:
        raise BadAddress("options behind ? or # are not taken")
    login, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = login.partition(":")
    if at and not colon:
        raise BadAddress("a login is user:password or :password, before the @")
    names = [part for part in parts.path.split("/") if part]
    shared = {"tls": tls, "user": unquote(user) or None, "password": unquote(password) or None}
    if kind == "unix":
        if hosts or not names:
            raise BadAddress("a unix socket is unix:///path")
        return Address(kind, path=parts.path, **shared)  # type: ignore[arg-type]
    service = names.pop(0) if kind == "sentinel" and names else ""
    if kind == "sentinel" and not service:
        raise BadAddress("behind the Sentinels stands the service's name: "
                         "redis+sentinel://host:port,host:port/service")  # fmt: skip
    database = _database(names, kind)
    return Address(kind, _hosts(hosts, kind), service=unquote(service), database=database,
                   **shared)  # type: ignore[arg-type]  # fmt: skip


def _database(names: list[str], kind: Kind) -> int:
    if kind == "cluster" and names:
        raise BadAddress("a cluster has one database: nothing may follow its hosts")
    if len(names) > 1 or not all(re.fullmatch(r"\d{1,4}", name) for name in names):
        raise BadAddress("a database is a number, and the last part")
    return int(names[0]) if names else 0


def _hosts(text: str, kind: Kind) -> tuple[tuple[str, int], ...]:
    hosts = []
    for host in text.split(","):
        match = _HOST.fullmatch(host)
        if match is None or not 0 < (port := int(match["port"] or _PORTS[kind])) < 65536:
            raise BadAddress("a host is name or name:port, with a port from 1 to 65535")
        hosts.append((match["host"].strip("[]"), port))
    if kind == "server" and len(hosts) > 1:
        raise BadAddress("several hosts need redis+sentinel:// or redis+cluster://")
    return tuple(hosts)
