"""The application behind the gate: routes and error handlers, in visible order."""

from __future__ import annotations

import logging
from typing import Any

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from adapters.errors import AdapterError
from server import errors
from server.adapting.leases import Leasing
from server.errors import HttpError
from server.operation.observer import LEFT
from server.routes import adapters, admin, metrics, openai, openapi, playground
from server.routes.collector import Present
from server.serving import Serving
from server.validation import problems
from steering.errors import SteeringError

logger = logging.getLogger("coxswain")


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HttpError)
    return errors.response(error)


async def _steering_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SteeringError)
    return errors.response(errors.from_steering(error))


async def _adapter_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterError)
    return errors.response(errors.from_adapters(error))


async def _routing_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"No such path: {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.method} is not possible on {request.url.path}"
    answer = errors.response(HttpError(error.status_code, message))
    answer.headers.update(error.headers or {})
    return answer


async def _invalid_body(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = problems([dict(e) if isinstance(e, dict) else {"type": "value_error", "msg": str(e)}
                      for e in error.errors()])  # fmt: skip
    lines = list(dict.fromkeys(str(problem) for problem in found))
    param = found[0].field if found and found[0].field != "body" else None
    message = "; ".join(lines[:3]) or "The request body is not valid."
    return errors.response(HttpError(400, message, param=param))


async def _vllm_error(_request: Request, error: Exception) -> JSONResponse:
    """Errors that vLLM raises for a caller's fault, and some of its own."""
    found = create_error_response(error)
    return errors.response(errors.from_vllm(found.error.model_dump()))


async def _engine_error(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, EngineDeadError):
        return errors.response(HttpError(503, "The engine has died; the server is ending.",
                                         code="dead", retry_after_s=5))  # fmt: skip
    return errors.response(HttpError(500, "The engine could not finish this request."))


async def _left(_request: Request, _error: Exception) -> Response:
    """The client left before its body was complete: nobody reads this."""
    return Response(status_code=LEFT)


async def _bug(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return errors.response(HttpError(500, "Internal error; the server's log has the details."))


def build_app(serving: Serving) -> ASGIApp:
    """The application for an engine that is up.

    Args:
        serving: the parts that the routes use.
    """
    app = FastAPI(
        title="Coxswain",
        version="0.1.0",
        description="A language model over the OpenAI API, steered per request.",
        redirect_slashes=False,
    )
    app.state.serving = serving
    app.state.present = Present()
    app.state.enable_server_load_tracking = False
    app.include_router(openai.router)
    app.include_router(admin.router)
    app.include_router(adapters.router)
    app.include_router(metrics.router)
    if serving.config.playground:
        app.include_router(playground.router)
    handlers: tuple[tuple[Any, Any], ...] = (
        (HttpError, _http_error),
        (SteeringError, _steering_error),
        (AdapterError, _adapter_error),
        (ClientDisconnect, _left),
        (HTTPException, _routing_error),
        (RequestValidationError, _invalid_body),
        (EngineDeadError, _engine_error),
        (EngineGenerateError, _engine_error),
        (VLLMError, _vllm_error),
        # vLLM raises these for bad values that it has no class of its own for.
        (ValueError, _vllm_error),
        (TypeError, _vllm_error),
        (OverflowError, _vllm_error),
        (NotImplementedError, _vllm_error),
        (jinja2.TemplateError, _vllm_error),
        (Exception, _bug),
    )
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)
    openapi.install(app, serving.methods)
    return Leasing(app)
