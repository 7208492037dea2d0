"""Who may call what: API keys for inference, the admin key for administration."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from starlette.datastructures import Headers
from starlette.types import Scope

from server.access import EVERYTHING, Access
from server.errors import HttpError
from server.operation.local import check_local, check_names, is_loopback
from server.paths import METRICS, is_admin, needs_key
from server.settings.auth import LimitedKey, digests_of_header
from server.settings.config import Config
from server.settings.operating import Rate


class Auth:
    """Checks keys in constant time.

    Args:
        config: sections `auth` and `server`.
    """

    def __init__(self, config: Config) -> None:
        auth, secret = config.auth, secrets.token_bytes(32)
        self._api = [_api_key(entry, config.limits, secret) for entry in auth.api_keys]
        self._admin = auth.admin_key.get_secret_value() if auth.admin_key else None
        self._metrics = auth.metrics_key.get_secret_value() if auth.metrics_key else None
        server = config.server
        # With a port of its own the administration is not behind the unix socket.
        by_tcp = server.uds is None or server.admin_port is not None
        self._loopback = is_loopback(server.host) and by_tcp
        limited = any(a.profiles is not None or a.adapters is not None for _, a in self._api)
        self._metrics_closed = self._metrics is not None or limited

    @property
    def admin_enabled(self) -> bool:
        """Whether the admin API answers at all."""
        return self._admin is not None or self._loopback

    def check(self, scope: Scope) -> Access:
        """Returns the rights of a request's key, or raises.

        Raises:
            HttpError: 400 for a `Host` or `Origin` that is none, 401 without a valid key, 403 for
                the wrong kind of key or a part that is off.
        """
        path, headers = scope["path"], Headers(scope=scope)
        check_names(headers)
        if is_admin(path):
            self._check_admin(scope, headers)
        elif needs_key(path) and self._api:
            access = self._find(headers)
            if access is None:
                raise HttpError(
                    401,
                    "Missing or unknown API key. Send it as `Authorization: Bearer …` or as "
                    "`x-api-key`.",
                    reason="unauthenticated",
                )
            return access
        elif path == METRICS and self._metrics_closed:
            self._check_metrics(headers)
        return EVERYTHING

    def _check_admin(self, scope: Scope, headers: Headers) -> None:
        if self._admin is not None:
            if _is(headers, self._admin):
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
        check_local(scope, headers)

    def _check_metrics(self, headers: Headers) -> None:
        """Its labels have the names of all profiles and adapters, and tell of everybody's use."""
        if not any(_is(headers, key) for key in (self._metrics, self._admin) if key is not None):
            raise HttpError(401, "Metrics need auth.metrics_key, or the admin key: "
                            "`Authorization: Bearer …`.", reason="unauthenticated")  # fmt: skip

    def _find(self, headers: Headers) -> Access | None:
        """The access of the API key that was given; the time does not tell which it was."""
        access = None
        digests = _given(headers)
        for expected, allowed in self._api:
            if any(hmac.compare_digest(digest, expected) for digest in digests):
                access = allowed
        return access


def _api_key(entry: LimitedKey, default: Rate, secret: bytes) -> tuple[bytes, Access]:
    profiles, adapters = (
        None if names is None else frozenset(names) for names in (entry.profiles, entry.adapters)
    )
    digest = entry.key.get_secret_value()
    rates = {
        name: getattr(entry if name in entry.model_fields_set else default, name)
        for name in Rate.model_fields
    }
    group = _group_of(entry)
    # Nobody may guess whose prompts the cache holds, so the salt is no plain name.
    salt = hmac.new(secret, group.encode(), hashlib.sha256).hexdigest()
    return digest, Access(
        profiles, adapters, _fingerprint(digest), group=group, salt=salt, rate=Rate(**rates)
    )


def groups_of(config: Config) -> frozenset[str]:
    """The groups of all API keys."""
    return frozenset(map(_group_of, config.auth.api_keys))


def _group_of(entry: LimitedKey) -> str:
    """The configured group, or one for the key alone."""
    return entry.group or f"key:{_fingerprint(entry.key.get_secret_value())}"


def _fingerprint(digest: bytes) -> str:
    return digest.hex()[:8]


def _given(headers: Headers) -> tuple[bytes, ...]:
    """Hashes of the key that was given, one for each way in which it may be meant; or none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("x-api-key", "")  # as Anthropic's clients send it
    # Not all blanks: what Latin-1 takes for one may end a letter in UTF-8.
    key = key.strip(" \t")
    return digests_of_header(key) if key else ()


def _is(headers: Headers, expected: bytes) -> bool:
    """Whether the given key is this one."""
    return any(hmac.compare_digest(digest, expected) for digest in _given(headers))


def admin_name(headers: Headers) -> str:
    """Whom records name as their cause: a fingerprint of the key, or a caller without one."""
    digests = _given(headers)
    return f"key {_fingerprint(digests[0])}" if digests else "local"
