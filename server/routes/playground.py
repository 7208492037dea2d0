"""GET /playground: the page with its files, and its data for the caller's key.

The page is public: it holds nothing but itself, and asks for keys. What it shows comes from routes
that check them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.access import Access
from server.adapting.service import Adapters
from server.context import context_of
from server.errors import HttpError
from server.serving import Serving
from steering.spec import Profile

router = APIRouter()

_FOLDER = Path(__file__).parents[1] / "playground"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE = "index.html"
_FILES = {file.name: file.read_bytes() for file in _FOLDER.iterdir() if file.suffix in _TYPES}
_HEADERS = {
    # Nothing from elsewhere, nothing inline, and no way for a string to become markup.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}


def _file(name: str) -> Response:
    kind = _TYPES[Path(name).suffix]
    return Response(_FILES[name], headers=_HEADERS, media_type=kind)


@router.get("/playground", include_in_schema=False)
async def page() -> Response:
    """The page."""
    return _file(_PAGE)


@router.get("/playground/{name}", include_in_schema=False)
async def part(name: str) -> Response:
    """One of the files that the page loads."""
    if name == _PAGE or name not in _FILES:
        raise HttpError(404, f"No such path: /playground/{name}")
    return _file(name)


@router.get("/v1/playground")
async def offers(raw_request: Request) -> Response:
    """What the caller's key may use: profiles, methods with their options, streams, adapters."""
    parts: Serving = raw_request.app.state.serving
    resolver, access = parts.resolver, context_of(raw_request.scope).access
    may_steer = resolver.inline and access.steers
    limits = resolver.limits
    return JSONResponse(
        {
            "base": resolver.base_name,
            "chat": parts.has_template,
            "max_model_len": parts.engine.model_config.max_model_len,
            "own_methods": may_steer,
            "options": may_steer,
            "limits": {"strength": limits.strength, "weight": limits.weight,
                       "top_k": limits.top_k, "best_of": limits.best_of},
            "profiles": [
                _profile(name, profile, may_steer)
                for name, profile in access.seen_profiles(resolver.profiles).items()
            ],
            "methods": [
                {"name": name, "description": (method.__doc__ or "").strip().split("\n")[0],
                 "options": method.config.model_json_schema()}
                for name, method in (resolver.methods.items() if may_steer else ())
            ],
            "streams": _streams(parts) if may_steer else [],
            "adapters": _adapters(parts.adapters, access)
            if parts.adapters and resolver.inline
            else [],
        }
    )  # fmt: skip


def _profile(name: str, profile: Profile, may_steer: bool) -> dict[str, Any]:
    """A profile without its texts: prompts and templates are the operator's own, and so are the
    options where callers take profiles as they are.
    """
    options = {
        k: v for k, v in profile.spec.items() if k != "prompts" and (may_steer or k == "method")
    }
    return {
        "name": name,
        "description": profile.description,
        "template": profile.chat_template is not None,
        "limits": profile.limits.model_dump(exclude_none=True),
        "options": options,
    }


def _streams(parts: Serving) -> list[dict[str, Any]]:
    configured = parts.config.streams
    streams = []
    for name, head in parts.resolver.snapshot.streams.items():
        same_as = configured[name].same_as if name in configured else None
        layer = configured[name].layer if name in configured else None
        streams.append({"name": name, "head": head, "same_as": same_as, "layer": layer})
    return streams


def _adapters(adapters: Adapters, access: Access) -> list[dict[str, Any]]:
    entries = []
    for name in adapters.names(access):
        record = adapters.manager.records.get(name)
        if record is None:
            continue
        facts = record.want.facts
        entries.append({"name": name, "version": record.want.version, "stream": record.want.stream,
                        "kind": facts.kind if facts else None})  # fmt: skip
    return entries
