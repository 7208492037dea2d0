"""The application behind the gate: routes and error handlers, in visible order."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from server import errors
from server.context import LEFT, context_of
from server.errors import HttpError
from server.requests.failures import MEANT, http_error
from server.routes import about, adapters, admin, messages, metrics, openai, openapi, playground
from server.routes.collector import Present
from server.settings.config import Config
from server.validation import problems
from steering.plugins import Registry


async def _error(request: Request, error: Exception) -> Response:
    """Errors that say whose fault they are, and bugs, which are logged."""
    context = context_of(request.scope)
    failure = http_error(error, context.fields)
    context.refusal = failure.reason
    return errors.response(failure, request.scope["path"])


async def _routing_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"No such path: {request.scope['path']}"
    elif error.status_code == 405:
        message = f"{request.method} is not possible on {request.scope['path']}"
    answer = errors.response(HttpError(error.status_code, message), request.scope["path"])
    answer.headers.update(error.headers or {})
    return answer


async def _invalid_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    bad_values = problems(
        [
            dict(e) if isinstance(e, dict) else {"type": "value_error", "msg": str(e)}
            for e in error.errors()
        ]
    )
    lines = list(dict.fromkeys(str(problem) for problem in bad_values))
    param = bad_values[0].field if bad_values and bad_values[0].field != "body" else None
    message = "; ".join(lines[:3]) or "The request body is not valid."
    return errors.response(HttpError(400, message, param=param), request.scope["path"])


async def _left(_request: Request, _error: Exception) -> Response:
    """The client left before its body was complete: nobody reads this."""
    return Response(status_code=LEFT)


def build_app(config: Config, methods: Registry) -> FastAPI:
    """The application; `state.serving` is to be set before it is used. It takes seconds: run in a
    thread.

    Args:
        config: the settings.
        methods: the installed methods.
    """
    app = FastAPI(
        title="Coxswain",
        version=version("coxswain"),
        description="A language model over the OpenAI API, steered per request.",
        redirect_slashes=False,
    )
    app.state.present = Present()
    app.state.enable_server_load_tracking = False
    app.include_router(openai.router)
    app.include_router(messages.router)
    app.include_router(about.router)
    app.include_router(admin.router)
    app.include_router(adapters.router)
    app.include_router(metrics.router)
    if config.playground:
        app.include_router(playground.router)
    for kind in (*MEANT, Exception):
        app.add_exception_handler(kind, _error)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    openapi.install(app, methods, config.server.root_path)
    return app
