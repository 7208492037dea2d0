"""Our Prometheus series, beside vLLM's. All labels are bounded: configured or known names only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector
from starlette.types import ASGIApp, Receive, Scope, Send

NONE = "none"
"""The labels of a request without steering, or refused before its steering is known."""

REQUESTS = Counter(
    "coxswain_requests",
    "Inference requests by steering method, profile and HTTP status (499: the client left).",
    ["method", "profile", "status"],
)
SECONDS = Histogram(
    "coxswain_request_seconds",
    "Time from the first byte of a request to the last of its answer, in seconds.",
    ["method"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)

SCOPE_KEY = "coxswain.labels"


@dataclass
class Labels:
    """What a route finds out about its request."""

    method: str = NONE
    profile: str = NONE


class StreamCounters(Collector):
    """The worker's cumulative counters, as last polled."""

    def __init__(self) -> None:
        self.tokens: Mapping[str, int] = {}
        self.passes: Mapping[str, int] = {}
        self.steps = 0

    def update(self, counters: Mapping[str, Any]) -> None:
        """Takes over a poll's answer."""
        self.tokens, self.passes = dict(counters["tokens"]), dict(counters["passes"])
        self.steps = int(counters["steps"])

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        for name, text, values in (
            ("coxswain_stream_tokens", "Tokens that a stream has run.", self.tokens),
            ("coxswain_stream_passes", "Forward passes of a stream.", self.passes),
        ):
            family = CounterMetricFamily(name, text, labels=["stream"])
            for stream, value in values.items():
                family.add_metric([stream], value)
            yield family

    def register(self) -> None:
        """Shows the counters in `/metrics`."""
        REGISTRY.register(self)


class Meter:
    """ASGI middleware that counts inference requests and their time.

    Args:
        app: the application inside.
        prefixes: paths that count.
    """

    def __init__(self, app: ASGIApp, prefixes: tuple[str, ...] = ("/v1/",)) -> None:
        self.app = app
        self.prefixes = prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or not scope["path"].startswith(self.prefixes)
        ):
            await self.app(scope, receive, send)
            return
        labels = Labels()
        scope[SCOPE_KEY] = labels
        began = time.perf_counter()
        status, complete, left = 500, False, False

        async def listening() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left |= message["type"] == "http.disconnect" and not complete
            return message

        async def watching(message: MutableMapping[str, Any]) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            complete |= message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, listening, watching)
        finally:
            code = 499 if left else status
            REQUESTS.labels(labels.method, labels.profile, str(code)).inc()
            SECONDS.labels(labels.method).observe(time.perf_counter() - began)
