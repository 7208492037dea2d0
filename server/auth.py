"""Who may call what: API keys for inference, the admin key for administration."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.config import Config
from server.errors import HttpError

_GUARDED = ("/v1/", "/tokenize", "/detokenize")


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be reached from this machine."""
    if host.strip("[]").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    return urlsplit(f"//{header}").hostname or ""


class Auth:
    """Checks keys in constant time; says which of the two doors a path belongs to.

    Args:
        config: sections `auth` and `server`.
    """

    def __init__(self, config: Config) -> None:
        self._api = [key.get_secret_value().encode() for key in config.auth.api_keys]
        admin = config.auth.admin_key
        self._admin = admin.get_secret_value().encode() if admin else None
        self._loopback = is_loopback(config.server.host)

    @property
    def admin_enabled(self) -> bool:
        """Whether the admin API answers at all."""
        return self._admin is not None or self._loopback

    def check(self, path: str, headers: Headers) -> None:
        """Lets a request pass or raises.

        Raises:
            HttpError: 401 without a valid key, 403 for the wrong kind of key or a closed door.
        """
        if path == "/admin" or path.startswith("/admin/"):
            self._check_admin(headers)
        elif path.startswith(_GUARDED) and self._api and not self._is_api(headers):
            raise HttpError(
                401, "Missing or unknown API key. Send it as `Authorization: Bearer …`."
            )

    def _check_admin(self, headers: Headers) -> None:
        if self._admin is not None:
            if _matches(_bearer(headers), [self._admin]):
                return
            if self._api and self._is_api(headers):
                raise HttpError(403, "This API key is not the admin key.")
            raise HttpError(401, "The admin key is required: `Authorization: Bearer …`.")
        if not self._loopback:
            raise HttpError(
                403, "The admin API is off: set auth.admin_key, or bind the server to loopback."
            )
        # Without a key the address is the lock. A web page in a local browser could pick it by
        # rebinding a name of its own to 127.0.0.1, or by posting across origins.
        origin = headers.get("origin")
        if not is_loopback(_host_of(headers.get("host", ""))) or (
            origin is not None and not is_loopback(urlsplit(origin).hostname or "")
        ):
            raise HttpError(403, "Without an admin key, only local, same-origin callers may pass.")

    def _is_api(self, headers: Headers) -> bool:
        return _matches(_bearer(headers), self._api)


def _bearer(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode() if scheme.lower() == "bearer" else b""


def _matches(given: bytes, keys: list[bytes]) -> bool:
    """Whether one of the keys was given; the time does not tell which, nor how much of it."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(given, key)
    return found and bool(given)
