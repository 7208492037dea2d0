"""Who calls from this machine, as far as it can be known: the lock of an admin API without key."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from server.errors import HttpError

_FORWARDED = frozenset(
    {
        "forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip",
        "cf-connecting-ip", "cf-ray", "cf-visitor", "cdn-loop", "fastly-client-ip",
        "fly-client-ip", "forwarded-for", "x-original-forwarded-for", "x-originating-ip",
        "x-remote-ip", "x-remote-addr", "x-proxyuser-ip", "x-amzn-trace-id", "x-amz-cf-id",
        "x-azure-clientip", "x-azure-socketip", "x-appengine-user-ip", "x-cloud-trace-context",
    }
)  # fmt: skip
"""Headers that only proxies set, as their handbooks name them."""

_FORWARDED_BEGIN = ("x-forwarded", "x-envoy-", "x-original-", "tailscale-")


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be reached from this machine."""
    host = host.strip("[]")
    if host.lower() == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)  # ::ffff:127.0.0.1, of sockets for both families
    return bool((mapped or ip).is_loopback)


def check_names(headers: Headers) -> None:
    """Refuses requests whose `Host` or `Origin` names nothing: libraries trip over them.

    Raises:
        HttpError: 400.
    """
    if len(headers.getlist("host")) > 1:
        raise HttpError(400, "The header Host is there more than once.")
    _host_of("//" + headers.get("host", ""), "Host")
    for origin in headers.getlist("origin"):
        _host_of(origin, "Origin")


def check_local(scope: Scope, headers: Headers) -> None:
    """Lets requests pass that come from this machine, and from nowhere else through it.

    The address is the lock here. A proxy on this machine opens it for everybody, so its traces
    refuse, and so does a unix socket, behind which a proxy is usual and no address is known. A web
    page in a local browser could pick it by rebinding a name of its own to 127.0.0.1, or by posting
    across origins.

    Raises:
        HttpError: 403.
    """
    client = scope.get("client")
    if client is None or not is_loopback(str(client[0])):
        raise _refusal("it answers callers on this machine only")
    for name in headers:
        if name in _FORWARDED or name.startswith(_FORWARDED_BEGIN):
            raise _refusal(f"the header {name} says that the request came through a proxy")
    hosts = [_host_of("//" + headers.get("host", ""), "Host")]
    hosts += [_host_of(origin, "Origin") for origin in headers.getlist("origin")]
    if not all(map(is_loopback, hosts)):
        raise _refusal("only local, same-origin callers may pass")


def _refusal(why: str) -> HttpError:
    return HttpError(
        403, f"The admin API has no key (auth.admin_key): {why}.", reason="forbidden"
    )  # fmt: skip


def _host_of(url: str, header: str) -> str:
    """The host of a URL; empty: it has none.

    Raises:
        HttpError: 400, it is none.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 – it is read here, and then it raises
    except ValueError as error:
        raise HttpError(400, f"The header {header} cannot be read: {error}.") from error
    return parts.hostname or ""
