"""A real server with a bug in its own process, for requests that ask for it.

    python -m tests.buggy PYTHON -m server.main serve FILE …

A request whose id is `bug:POINT:ERROR` (and anything behind it) meets the bug; others do not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from asgi_correlation_id import correlation_id

ERRORS = (ValueError, KeyError, TypeError, AttributeError)
SAYS = "secret of the code"
"""What the error's text has, and no answer may have."""

POINTS: dict[str, tuple[str, ...]] = {
    "resolve": ("server.requests.resolve.Resolver.model_of",),
    "parse": ("server.routes.parse.own_names",),
    "prepare": ("server.requests.run.prepare",),
    "run": ("server.requests.run.counted",),
    "report": ("server.engine_vllm.SteeredLLM.report",),
    "summary": ("server.routes.openai.summary",),
    "sse": ("server.routes.sse._begin",),
    "building": (
        "vllm.entrypoints.openai.chat_completion.serving.ChatCompletionResponse",
        "vllm.entrypoints.openai.chat_completion.serving.ChatCompletionResponseStreamChoice",
        "vllm.entrypoints.openai.completion.serving.CompletionResponse",
        "vllm.entrypoints.openai.completion.serving.CompletionResponseStreamChoice",
        "vllm.entrypoints.openai.responses.serving.ResponseUsage",
    ),
}
"""Where a bug is → what of the process has it. `building`: vLLM makes an answer of outputs."""


def _bug(point: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def buggy(*args: Any, **kwargs: Any) -> Any:
        identifier = correlation_id.get() or ""
        if identifier.startswith(f"bug:{point}:"):
            kind = identifier.split(":")[2]
            raise next(error for error in ERRORS if error.__name__ == kind)(SAYS)
        return real(*args, **kwargs)

    return buggy


def plant() -> None:
    """Puts the bugs in."""
    from pkgutil import resolve_name

    for point, names in POINTS.items():
        for name in names:
            owner, attribute = name.rsplit(".", 1)
            holder = resolve_name(owner)
            setattr(holder, attribute, _bug(point, getattr(holder, attribute)))


def main() -> None:
    """Ends the process with the server's status."""
    from server import launch
    from server.main import run

    real = launch.Run._load

    async def load(self: Any, ports: list[int]) -> Any:
        found = await real(self, ports)
        plant()  # not before: it imports vLLM
        return found

    launch.Run._load = load  # type: ignore[method-assign]
    status = run(sys.argv[sys.argv.index("server.main") + 1 :])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as `server.main`


if __name__ == "__main__":
    main()
