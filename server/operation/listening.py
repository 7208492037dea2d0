"""How the server is reached: its socket, TLS, and the two steps in front of everything else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import stat
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings.operating import ServerConfig, TlsConfig

logger = logging.getLogger("coxswain")

REFRESH_S = 10.0
"""How often TLS files are looked at."""

_COUNTED = [
    f"x-ratelimit-{what}-{of}"
    for what in ("limit", "remaining", "reset")
    for of in ("requests", "tokens")
]
EXPOSED = ("x-request-id", "retry-after", *_COUNTED)
"""Response headers that pages of other origins may read."""


def bind(server: ServerConfig) -> socket.socket:
    """The listening socket.

    Raises:
        OSError: the address is taken or not ours; says which.
    """
    if server.uds is not None:
        return _bind_unix(Path(server.uds))
    return _bind_tcp(server.host, server.port, "server.port")


def bind_all(server: ServerConfig) -> list[socket.socket]:
    """The listening sockets: the main one, and that of the administration, if it has its own.

    Raises:
        OSError: an address is taken or not ours; says which.
    """
    main = bind(server)
    if server.admin_port is None:
        return [main]
    try:
        return [main, _bind_tcp(server.host, server.admin_port, "server.admin_port")]
    except OSError:
        main.close()
        cleared(server)
        raise


def _bind_tcp(host: str, port: int, setting: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where a socket says that it is TCP's.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(f"{setting}: cannot bind {host}:{port}: {error.strerror}") from error
    sock.set_inheritable(False)
    return sock


def _bind_unix(path: Path) -> socket.socket:
    """A socket at a path; one that nobody listens on any more is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                if other.connect_ex(str(path)) == 0:
                    raise OSError(f"server.uds: somebody listens on {path}")
            path.unlink()
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        raise OSError(
            why if why.startswith("server.") else f"server.uds: cannot bind {path}: {why}"
        ) from error
    sock.set_inheritable(False)
    return sock


def address(server: ServerConfig, port: int | None = None, *, admin: bool = False) -> str:
    """Where a person on this machine finds the server.

    Args:
        server: the settings.
        port: the one that was bound; default: the configured one.
        admin: it is the administration's own, which is never a unix socket.
    """
    if server.uds is not None and not admin:
        return f"unix:{server.uds}"
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    host = f"[{host}]" if ":" in host else host
    scheme = "http" if server.tls is None else "https"
    return f"{scheme}://{host}:{server.port if port is None else port}"


_CLIENTS = {"ignored": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


def tls_options(tls: TlsConfig | None) -> dict[str, Any]:
    """The TLS options of `uvicorn.Config`.

    Raises:
        OSError: a file cannot be read, or holds something else; names its setting.
    """
    if tls is None:
        return {}
    for name in ("certificate", "key", "client_ca"):
        file = getattr(tls, name)
        try:
            if file is not None:
                Path(file).read_bytes()
        except OSError as error:
            raise OSError(f"server.tls.{name}: {file}: {error.strerror}") from error
    options = {
        "ssl_certfile": tls.certificate,
        "ssl_keyfile": tls.key,
        "ssl_ca_certs": tls.client_ca,
        "ssl_cert_reqs": _CLIENTS[tls.clients],
        **({} if tls.ciphers is None else {"ssl_ciphers": tls.ciphers}),
    }
    try:
        # A key with a password would ask for it on the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key, password=_no_password)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
        if tls.ciphers is not None:
            context.set_ciphers(tls.ciphers)
    except (ssl.SSLError, ValueError) as error:
        raise OSError(f"server.tls: {' '.join(map(str, error.args))}") from error
    return options


def _no_password() -> str:
    raise ValueError("the key has a password; give one without")


def _signature(tls: TlsConfig) -> list[tuple[int, int] | None]:
    signature: list[tuple[int, int] | None] = []
    for file in (tls.certificate, tls.key, tls.client_ca):
        try:
            facts = os.stat(file) if file is not None else None
        except OSError:
            facts = None
        signature.append(None if facts is None else (facts.st_mtime_ns, facts.st_ino))
    return signature


async def refresh(http: uvicorn.Config, tls: TlsConfig) -> None:
    """Reads the TLS files again when they change; new connections get the new ones. For ever.

    Looks, and does not listen: the files of a Kubernetes secret change by a link above them.
    """
    loaded = _signature(tls)
    while True:
        await asyncio.sleep(REFRESH_S)
        if (now := _signature(tls)) == loaded or None in now[:2] or http.ssl is None:
            continue
        try:
            http.ssl.load_cert_chain(tls.certificate, tls.key, password=_no_password)
            if tls.client_ca is not None:
                http.ssl.load_verify_locations(tls.client_ca)
        except (OSError, ssl.SSLError, ValueError) as error:
            logger.warning("server.tls: the changed files cannot be used: %s", error)
            continue
        loaded = now
        logger.info("server.tls: the changed files are in use")


class _RootPath:
    """Takes the root path from the front of paths, so that all behind it sees one form of them.

    All of it: the check of keys for `/v1/…` and the router must see the same path, and
    Starlette takes it off once more.
    """

    def __init__(self, app: ASGIApp, root: str) -> None:
        self._app, self._root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            path = scope["path"]
            while path == self._root or path.startswith(self._root + "/"):
                path = path.removeprefix(self._root) or "/"
            scope = {**scope, "path": path, "root_path": self._root}
        await self._app(scope, receive, send)


def outermost(app: ASGIApp, server: ServerConfig) -> ASGIApp:
    """An application behind the steps that come before its log and its keys.

    Preflights of browsers carry no key, so they are answered here; refusals of what is behind get
    the headers without which a page could not read them.
    """
    if server.root_path:
        app = _RootPath(app, server.root_path)
    if (cors := server.cors) is not None:
        app = CORSMiddleware(
            app,
            allow_origins=cors.origins,
            allow_methods=cors.methods,
            allow_headers=cors.headers,
            allow_credentials=cors.credentials,
            expose_headers=EXPOSED,
        )
    return app


def cleared(server: ServerConfig) -> None:
    """Removes the unix socket, if there is one."""
    if server.uds is not None:
        with contextlib.suppress(OSError):
            os.unlink(server.uds)
