"""The two listeners of a server whose administration has a port of its own: who answers what."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import HttpError
from server.paths import METRICS, PROBES, is_admin


class Side:
    """One listener's view of the gate: paths of the other one are not there.

    Args:
        app: the gate.
        admin: True: only administration, metrics and probes answer. False: everything but
            administration.
    """

    def __init__(self, app: ASGIApp, *, admin: bool) -> None:
        self._app, self._admin = app, admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._has(scope["path"]):
            error = HttpError(404, f"No such path on this port: {scope['path']}")
            await error(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has(self, path: str) -> bool:
        if path in PROBES or path == METRICS:
            return True
        return is_admin(path) == self._admin
