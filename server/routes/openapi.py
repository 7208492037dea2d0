"""The OpenAPI schema of `steering`: one typed choice for each installed method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.paths import PROBES, is_admin, is_messages, is_model, needs_key
from steering.method import Method

_BODIES = (
    "SteeredChatRequest", "SteeredCompletionRequest", "SteeredResponsesRequest",
    "SteeredMessagesRequest", "SteeredCountRequest",
)  # fmt: skip

EXAMPLES: list[Any] = [
    "my-profile",
    {"method": "proxy_tuning", "expert": "chat", "anti_expert": "plain", "strength": 0.8},
    {"profile": "my-profile", "strength": 0.5, "report": True},
]


def steering_schema(
    methods: Mapping[str, Method[Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of the field, and the component schemas that it refers to.

    Args:
        methods: the installed methods.
    """
    components: dict[str, Any] = {}
    choices: list[dict[str, Any]] = [
        {"type": "string", "description": "A profile's name.", "title": "Profile"}
    ]
    for name, method in methods.items():
        schema = method.config.model_json_schema(ref_template="#/components/schemas/{model}")
        components |= schema.pop("$defs", {})
        title = f"steering_{name}"
        components[title] = schema
        choices.append({"$ref": f"#/components/schemas/{title}"})
    choices.append(
        {
            "type": "object",
            "title": "ProfileOverride",
            "description": "A profile with some of its options changed. `profile` may be left "
            "out where the request's model is a profile.",
            "properties": {"profile": {"type": "string"}},
        }
    )
    choices.append({"type": "null"})
    field = {
        "title": "Steering",
        "description": "How this request is steered.",
        "anyOf": choices,
        "examples": EXAMPLES,
    }
    return field, components


def _error_schema() -> dict[str, Any]:
    null_or_text = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"},
              "param": null_or_text, "code": null_or_text}  # fmt: skip
    error = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


def _messages_error_schema() -> dict[str, Any]:
    """Anthropic's."""
    fields = {"type": {"type": "string"}, "message": {"type": "string"}}
    error = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"type": {"const": "error"}, "error": error},
            "required": ["type", "error"]}  # fmt: skip


def statuses(path: str, operation: dict[str, Any]) -> list[int]:
    """The errors that an operation may answer with.

    Args:
        path: as in the schema.
        operation: its entry there.
    """
    codes = {500, 503}
    if needs_key(path) or is_admin(path):
        codes |= {401, 403, 504}
    if is_model(path):
        codes.add(429)
    if "{" in path or "adapter" in path:
        codes |= {400, 404, 409}
    if "requestBody" in operation:
        codes |= {400, 404, 408, 413, 422, 501}
    if "adapter" in path:
        codes.add(507)
    return sorted(codes)


def _tell_errors(schema: dict[str, Any]) -> None:
    """Our shapes of errors in place of FastAPI's own."""
    schemas = schema["components"]["schemas"]
    schemas["Error"], schemas["MessagesError"] = _error_schema(), _messages_error_schema()
    for path, operations in schema["paths"].items():
        name = "MessagesError" if is_messages(path) else "Error"
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for status in statuses(path, operation):
                response = {"description": HTTPStatus(status).phrase, "content": content}
                operation["responses"].setdefault(str(status), response)


def _probes() -> dict[str, Any]:
    """The paths that the gate answers before there is an application."""
    fields = {"status": {"type": "string"}, "in_flight": {"type": "integer"},
              "reason": {"type": "string"}}  # fmt: skip
    shape = {"type": "object", "properties": fields, "required": ["status", "in_flight"]}
    content = {"application/json": {"schema": shape}}
    takes = "whether it takes requests"
    purposes = {"/health": "whether the process is of use", "/ready": takes,
                "/ping": f"{takes}; SageMaker asks here"}  # fmt: skip
    return {
        path: {
            method.lower(): {
                "summary": f"Says {what}.",
                "operationId": f"{path.strip('/')}_{method.lower()}",
                "responses": {
                    "200": {"description": "It is.", "content": content},
                    "503": {"description": "It is not; `reason` says why.", "content": content},
                },
            }
            for method in PROBES[path]
            if method != "HEAD"
        }
        for path, what in purposes.items()
    }


def schema_of(
    app: FastAPI, methods: Mapping[str, Method[Any]], root_path: str = ""
) -> dict[str, Any]:
    """The application's schema, with the methods.

    Args:
        app: with all of its routes.
        methods: the installed methods.
        root_path: where a proxy puts the server.
    """
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes,
        servers=[{"url": root_path}] if root_path else None,
    )  # fmt: skip
    field, components = steering_schema(methods)
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas |= components
    for body in _BODIES:
        schemas[body]["properties"]["steering"] = field
    schema["paths"] |= _probes()
    _tell_errors(schema)
    return schema


def install(app: FastAPI, methods: Mapping[str, Method[Any]], root_path: str = "") -> None:
    """Makes the schema, and serves its bytes as they are. It takes long: run in a thread.

    FastAPI would make it on the event loop when it is first asked for, while all streams wait.
    """
    app.openapi_schema = schema_of(app, methods, root_path)
    page = json.dumps(app.openapi_schema, separators=(",", ":")).encode()

    async def openapi(_request: Request) -> Response:
        return Response(page, media_type="application/json")

    for i, route in enumerate(app.router.routes):
        if isinstance(route, Route) and route.path == app.openapi_url:
            app.router.routes[i] = Route(route.path, openapi, include_in_schema=False)
