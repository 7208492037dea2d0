"""Who may call what: API keys for inference, the admin key for administration.

Only hashes of keys are kept. Keys are long and random, so a plain SHA-256 is enough: there is
nothing to guess, and a slow hash would be paid for at every request.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers

from server.access import EVERYTHING, Access
from server.errors import HttpError
from server.settings.config import HASHED, Config, LimitedKey
from server.settings.operating import Rate

_ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Paths beside `/admin` that need the admin key: vLLM's own."""

_GUARDED = ("/v1/", "/tokenize", "/detokenize")


def is_admin(path: str) -> bool:
    """Whether a path belongs to administration."""
    return path == "/admin" or path.startswith("/admin/") or path in _ADMIN


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
    """Checks keys in constant time; says whether a path is administration's.

    Args:
        config: sections `auth` and `server`.
    """

    def __init__(self, config: Config) -> None:
        self._api = [_api_key(entry, config.limits) for entry in config.auth.api_keys]
        admin = config.auth.admin_key
        self._admin = _digest_of(admin) if admin else None
        self._loopback = is_loopback(config.server.host)

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
        elif path.startswith(_GUARDED) and self._api:
            found = self._find(headers)
            if found is None:
                raise HttpError(
                    401,
                    "Missing or unknown API key. Send it as `Authorization: Bearer …`.",
                    reason="unauthenticated",
                )
            return found
        return EVERYTHING

    def _check_admin(self, headers: Headers) -> None:
        if self._admin is not None:
            given = _bearer(headers)
            if given and hmac.compare_digest(_digest(given), self._admin):
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
        given = _bearer(headers)
        digest, found = _digest(given), None
        for known, allowed in self._api:
            if hmac.compare_digest(digest, known) and given:
                found = allowed
        return found


def _api_key(entry: SecretStr | LimitedKey, default: Rate) -> tuple[bytes, Access]:
    if isinstance(entry, SecretStr):
        digest = _digest_of(entry)
        return digest, Access(caller=_fingerprint(digest))
    profiles, adapters = (
        None if names is None else frozenset(names) for names in (entry.profiles, entry.adapters)
    )
    digest = _digest_of(entry.key)
    rates = {
        name: getattr(entry if name in entry.model_fields_set else default, name)
        for name in Rate.model_fields
    }
    return digest, Access(profiles, adapters, _fingerprint(digest), Rate(**rates))


def _digest_of(key: SecretStr) -> bytes:
    text = key.get_secret_value()
    if text.startswith(HASHED):
        return bytes.fromhex(text.removeprefix(HASHED))
    return _digest(text.encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _fingerprint(digest: bytes) -> str:
    return digest.hex()[:8]


def _bearer(headers: Headers) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode() if scheme.lower() == "bearer" else b""


def admin_name(headers: Headers) -> str:
    """Whom records name as their cause: a fingerprint of the key, or a caller without one."""
    given = _bearer(headers)
    return f"key {_fingerprint(_digest(given))}" if given else "local"
