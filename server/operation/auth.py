"""Who may call what: API keys for inference, the admin key for administration."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.access import EVERYTHING, Access
from server.errors import HttpError
from server.paths import is_admin, needs_key
from server.settings.auth import LimitedKey, digests_of_header
from server.settings.config import Config
from server.settings.operating import Rate


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
    """Checks keys in constant time.

    Args:
        config: sections `auth` and `server`.
    """

    def __init__(self, config: Config) -> None:
        self._api = [_api_key(entry, config.limits) for entry in config.auth.api_keys]
        admin = config.auth.admin_key
        self._admin = admin.get_secret_value() if admin else None
        # Behind a unix socket there is usually a proxy, whose clients may be anywhere.
        self._loopback = is_loopback(config.server.host) and config.server.uds is None

    @property
    def admin_enabled(self) -> bool:
        """Whether the admin API answers at all."""
        return self._admin is not None or self._loopback

    def check(self, path: str, headers: Headers) -> Access:
        """Lets a request pass, and says what it may use; or raises.

        Raises:
            HttpError: 401 without a valid key, 403 for the wrong kind of key or a part that is off.
        """
        if is_admin(path):
            self._check_admin(headers)
        elif needs_key(path) and self._api:
            found = self._find(headers)
            if found is None:
                raise HttpError(
                    401,
                    "Missing or unknown API key. Send it as `Authorization: Bearer …` or as "
                    "`x-api-key`.",
                    reason="unauthenticated",
                )
            return found
        return EVERYTHING

    def _check_admin(self, headers: Headers) -> None:
        if self._admin is not None:
            if any(hmac.compare_digest(one, self._admin) for one in _bearer(headers)):
                return
            if self._find(headers) is not None:
                raise HttpError(403, "This API key is not the admin key.", reason="forbidden")
            raise HttpError(401, "The admin key is required: `Authorization: Bearer …`.",
                            reason="unauthenticated")  # fmt: skip
        if not self._loopback:
            raise HttpError(
                403,
                "The admin API is off: set auth.admin_key, or bind the server to loopback.",
                reason="forbidden",
            )
        # Without a key the address is the lock. A web page in a local browser could pick it by
        # rebinding a name of its own to 127.0.0.1, or by posting across origins.
        origin = headers.get("origin")
        if not is_loopback(_host_of(headers.get("host", ""))) or (
            origin is not None and not is_loopback(urlsplit(origin).hostname or "")
        ):
            raise HttpError(403, "Without an admin key, only local, same-origin callers may pass.",
                            reason="forbidden")  # fmt: skip

    def _find(self, headers: Headers) -> Access | None:
        """The access of the API key that was given; the time does not tell which it was."""
        given, found = _bearer(headers), None
        for known, allowed in self._api:
            if any(hmac.compare_digest(one, known) for one in given):
                found = allowed
        return found


def _api_key(entry: LimitedKey, default: Rate) -> tuple[bytes, Access]:
    profiles, adapters = (
        None if names is None else frozenset(names) for names in (entry.profiles, entry.adapters)
    )
    known = entry.key.get_secret_value()
    rates = {
        name: getattr(entry if name in entry.model_fields_set else default, name)
        for name in Rate.model_fields
    }
    return known, Access(profiles, adapters, _fingerprint(known), Rate(**rates))


def _fingerprint(known: bytes) -> str:
    return known.hex()[:8]


def _bearer(headers: Headers) -> tuple[bytes, ...]:
    """Hashes of the key that was given, one for each way in which it may be meant; or none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("x-api-key", "")  # as Anthropic's clients send it
    key = key.strip()
    return digests_of_header(key) if key else ()


def admin_name(headers: Headers) -> str:
    """Whom records name as their cause: a fingerprint of the key, or a caller without one."""
    given = _bearer(headers)
    return f"key {_fingerprint(given[0])}" if given else "local"
