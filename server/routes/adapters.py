"""Administration of adapters, and vLLM's own two calls. The gate has checked the admin key."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, PlainTextResponse, Response

from adapters.errors import Conflict
from server.adapting.service import Adapters, described, failed
from server.errors import HttpError, from_adapters
from server.operation.auth import admin_name
from server.pieces import json_list
from server.routes.answers import takes
from server.routes.body import strict_json
from server.serving import Serving
from server.validation import problems

router = APIRouter()

Text = Annotated[str, Field(strict=True, max_length=4096)]
Flag = Annotated[bool, Field(strict=True)]
B = TypeVar("B", bound=BaseModel)

MOST_GROUPS = 256
"""Groups that one adapter may be private to."""


class AdapterRequest(BaseModel):
    """Body of POST /admin/adapters."""

    model_config = ConfigDict(extra="forbid")

    name: Text = Field(description="What requests will call it.")
    source: Text = Field(
        description="A folder under an allowed root, `hf://owner/name[@revision][/folder]`, "
        "`s3://bucket/folder` or `https://host/folder`."
    )
    version: Text = Field("1", description="A label; requests may say `name@version`.")
    stream: Text = Field("base", description="The stream whose layers it changes.")
    pin: Flag = Field(False, description="Never evict it from the engine.")
    replace: Flag = Field(False, description="Replace what has this name; or fetch it anew.")
    visible_to: Annotated[list[Text], Field(max_length=MOST_GROUPS)] | None = Field(
        None,
        description="Groups of API keys that alone see and use it: the `group` of a key, or `key:` "
        "and the first 8 hex digits of its SHA-256; []: all. Absent: as what has this name now, "
        "else all.",
    )


class LoadLora(BaseModel):
    """Body of POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: Text
    lora_path: Text
    load_inplace: bool = False


class UnloadLora(BaseModel):
    """Body of POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: Text
    lora_int_id: int | None = None


def _adapters(request: Request) -> Adapters:
    serving: Serving = request.app.state.serving
    if serving.adapters is None:
        raise HttpError(404, "This server has no adapters: its configuration lacks the section "
                        "`adapters`.")  # fmt: skip
    return serving.adapters


async def _body(request: Request, kind: type[B]) -> B:
    document = strict_json(await request.body())
    if not isinstance(document, dict):
        raise HttpError(400, "The body must be a JSON object.")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise problems([dict(e) for e in error.errors()])[0] from None


@router.get("/admin/adapters")
async def list_adapters(raw_request: Request) -> Response:
    """All adapters of the registry, and how this server stands to them."""
    adapters = _adapters(raw_request)
    residency, feed = adapters.loader.residency, adapters.manager.feed
    rest = {
        "engine": {
            "slots": residency.slots,
            "taken": len(residency.held),
            "bytes": residency.bytes,
            "max_bytes": residency.max_bytes,
            "loads": residency.loads,
            "evictions": residency.evictions,
        },
        "registry": {"away": feed.away, "losses": feed.losses},
    }
    manager = adapters.manager
    progress = await manager.progress(list(manager.records.values()))

    def shown(name: str) -> dict[str, Any] | None:
        record = manager.records.get(name)
        return described(record, adapters, progress.get(name, 0)) if record else None

    return json_list("adapters", sorted(manager.records), shown, rest)


@router.post("/admin/adapters", status_code=202, openapi_extra=takes(AdapterRequest))
async def load_adapter(raw_request: Request) -> Response:
    """Asks for an adapter; answers at once. Its `state` goes to `ready` or `failed`."""
    adapters = _adapters(raw_request)
    body = await _body(raw_request, AdapterRequest)
    record = await adapters.submit(
        body.name, body.source, version=body.version, stream=body.stream,
        replace=body.replace, pin=body.pin, by=admin_name(raw_request.headers),
        visible_to=body.visible_to,
    )  # fmt: skip
    return JSONResponse(described(record, adapters), 202)


@router.get("/admin/adapters/{name:path}")
async def get_adapter(name: str, raw_request: Request) -> Response:
    """One adapter."""
    adapters = _adapters(raw_request)
    record = await adapters.manager.registry.get(name)
    progress = await adapters.manager.progress([record])
    return JSONResponse(described(record, adapters, progress.get(name, 0)))


@router.delete("/admin/adapters/{name:path}", status_code=202)
async def unload_adapter(name: str, raw_request: Request) -> Response:
    """Unloads an adapter: new requests no longer find it, running ones finish."""
    adapters = _adapters(raw_request)
    return JSONResponse(described(await adapters.manager.remove(name), adapters), 202)


@router.post("/admin/adapters/{name:path}/pin")
async def pin_adapter(name: str, raw_request: Request) -> Response:
    """Brings an adapter into the engine and keeps it there."""
    adapters = _adapters(raw_request)
    return JSONResponse(described(await adapters.pin(name, True), adapters))


@router.post("/admin/adapters/{name:path}/unpin")
async def unpin_adapter(name: str, raw_request: Request) -> Response:
    """Lets an adapter be evicted again."""
    adapters = _adapters(raw_request)
    return JSONResponse(described(await adapters.pin(name, False), adapters))


@router.post(
    "/v1/load_lora_adapter", response_class=PlainTextResponse, openapi_extra=takes(LoadLora)
)
async def load_lora_adapter(raw_request: Request) -> Response:
    """VLLM's call: answers when the adapter is ready."""
    adapters = _adapters(raw_request)
    body = await _body(raw_request, LoadLora)
    name = body.lora_name
    existing = adapters.manager.records.get(name)
    if existing and (existing.state != "failed" or existing.serving) and not body.load_inplace:
        raise Conflict(f"The lora adapter '{name}' has already been loaded. If you want to load "
                       "the adapter in place, set 'load_inplace' to True.",
                       field="lora_name")  # fmt: skip
    await adapters.submit(name, body.lora_path, version="1", stream="base",
                          replace=body.load_inplace, pin=False,
                          by=admin_name(raw_request.headers))  # fmt: skip
    record = await adapters.until(name)
    if (fault := failed(record, adapters)) is not None:
        error = from_adapters(fault)
        error.param = "lora_path"
        raise error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter", response_class=PlainTextResponse, openapi_extra=takes(UnloadLora)
)
async def unload_lora_adapter(raw_request: Request) -> Response:
    """VLLM's call."""
    adapters = _adapters(raw_request)
    body = await _body(raw_request, UnloadLora)
    await adapters.manager.remove(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
